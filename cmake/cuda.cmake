# Whether nvcc is there and works with this C++ compiler, and for which GPUs it should compile.

# Sets in the caller: `state`, words for people, and `architectures`, empty where CUDA cannot be built.
function(find_cuda state architectures)
  set(${architectures} "" PARENT_SCOPE)
  find_program(nvcc NAMES nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
  if(NOT nvcc)
    set(${state} "not built: no nvcc was found" PARENT_SCOPE)
    return()
  endif()
  if(CMAKE_VERSION VERSION_LESS 3.25.2)
    set(${state} "not built: CMake ${CMAKE_VERSION} does not know C++20 for nvcc; 3.25.2 does" PARENT_SCOPE)
    return()
  endif()

  # Those that this nvcc knows.
  execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
  string(REGEX MATCHALL "compute_[0-9]+" known "${known}")
  list(TRANSFORM known REPLACE "compute_" "")
  if(CMAKE_CUDA_ARCHITECTURES)
    set(wanted ${CMAKE_CUDA_ARCHITECTURES})
  else()
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE present ERROR_QUIET RESULT_VARIABLE absent)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]+" present "${present}")
    list(TRANSFORM present REPLACE "\\." "")
    list(REMOVE_DUPLICATES present)
    set(wanted "")
    if(present AND NOT absent)
      foreach(one IN LISTS present)
        list(APPEND wanted ${one}-real)
      endforeach()
    else()
      # Those of data centres: A100, H100 and H200. Code for 80 also runs on 86 and 89; from the newest one's PTX, which
      # costs no more time, the driver compiles for newer GPUs when the kernels are first used.
      foreach(one IN ITEMS 80 90)
        if(one IN_LIST known)
          list(APPEND wanted ${one}-real)
          set(newest ${one})
        endif()
      endforeach()
      list(APPEND wanted ${newest}-virtual)
    endif()
  endif()

  # A small kernel with a cluster, through the whole tool chain.
  set(probe ${CMAKE_CURRENT_BINARY_DIR}/cuda_probe)
  file(WRITE ${probe}.cu [[
#include <cooperative_groups.h>
#include <cstdint>
__global__ void probe(float* p) {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#endif
  p[threadIdx.x] = 0;
}
int main() {
  cudaLaunchConfig_t config{};
  return cudaLaunchKernelEx(&config, probe, static_cast<float*>(nullptr));
}
]])
  list(GET known -1 newest_known)
  execute_process(
    COMMAND ${nvcc} -std=c++20 -ccbin ${CMAKE_CXX_COMPILER} -arch=sm_${newest_known} -cudart static
      -o ${probe} ${probe}.cu
    OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE failed)
  if(failed)
    string(REGEX MATCH "[^\n]*[Ee]rror[^\n]*" first "${output}")
    string(REPLACE "\"" "'" first "${first}")
    string(STRIP "${first}" first)
    set(${state} "not built: ${nvcc} does not work with ${CMAKE_CXX_COMPILER}: ${first}" PARENT_SCOPE)
    return()
  endif()
  set(CMAKE_CUDA_COMPILER ${nvcc} CACHE FILEPATH "nvcc")
  # 80-real is code, 90-virtual PTX, 90 both; words such as native are CMake's.
  set(shown "")
  foreach(one IN LISTS wanted)
    string(REGEX REPLACE "-(real|virtual)$" "" number "${one}")
    if(NOT one MATCHES "-virtual$")
      list(APPEND shown "${number}")
    endif()
    if(one MATCHES "^[0-9]+[a-z]?(-virtual)?$")
      list(APPEND shown "PTX of ${number} for newer ones")
    endif()
  endforeach()
  list(JOIN shown ", " shown)
  set(${state} "built for ${shown}" PARENT_SCOPE)
  set(${architectures} "${wanted}" PARENT_SCOPE)
endfunction()
