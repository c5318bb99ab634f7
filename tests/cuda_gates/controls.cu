// Planted errors, each of which a gate must catch.
namespace fusednorm::cuda {

// Under a kernel's name: element by element, and 16 bytes of who knows which memory.
template <class T, bool, bool>
__global__ void forward(const T* x, T* y) {
  y[threadIdx.x] = x[threadIdx.x];
  const float4* from = reinterpret_cast<const float4*>(x);
  float4* to = reinterpret_cast<float4*>(y);
  asm volatile("" : "+l"(from), "+l"(to));
  to[threadIdx.x] = from[threadIdx.x];
}
template __global__ void forward<float, false, false>(const float*, float*);

#if defined(PLANT_UNUSED)
__global__ void unused() { int nobody = 1; }
#endif

#if defined(PLANT_LOCAL)
__global__ void local(const int* which, float* p) {
  float v[32];
  for (int i = 0; i < 32; ++i) v[i] = 2 * p[i];
  for (int i = 0; i < 32; ++i) p[i] = v[which[i]];
}
#endif

#if defined(PLANT_SPILL)
__global__ void spill(float* p) {
  float v[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) v[i] = p[i * threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) p[i * threadIdx.x + 1] = v[47 - i] * v[i * 7 % 48];
}
#endif

}  // namespace fusednorm::cuda
