// The emulator's threads, barriers and shared memory. Compiled without sanitizers, which must see the kernels and not
// this bookkeeping.
//
//     launching thread ── baton ──▶ Block: an OS thread, so that thread_local is the block's shared memory
//                                     └── Fiber: a CUDA thread, a stack of its own
//
// One fiber runs at a time in the whole process; the others wait for a barrier or their turn. So nothing below is
// locked or atomic, apart from the baton.
#include "emu.h"

#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>
#include <semaphore>
#include <string>
#include <thread>
#include <vector>

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#error "compile emu.cpp with -fno-sanitize=all"
#endif

// The sanitizers' doors; null where they are not linked.
#define WEAK __attribute__((weak))
extern "C" {
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void* __tsan_get_current_fiber();
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_set_fiber_name(void*, const char*);
WEAK void __tsan_write_range(void*, size_t);
WEAK void AnnotateIgnoreReadsBegin(const char*, int);
WEAK void AnnotateIgnoreReadsEnd(const char*, int);
WEAK void AnnotateIgnoreWritesBegin(const char*, int);
WEAK void AnnotateIgnoreWritesEnd(const char*, int);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
}

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace emu {

Thread* running;
unsigned long seed =
    std::getenv("FUSEDNORM_EMU_SEED") ? std::strtoul(std::getenv("FUSEDNORM_EMU_SEED"), nullptr, 10) : 0;

namespace {

constexpr size_t kStack = 128 << 10;
constexpr int kPoison = 0xff;  // in every byte: NaN
constexpr unsigned long kLivelock = 20'000'000;

// What is allocated and copied here is no access of the kernel's.
struct Quiet {
  Quiet() {
    if (AnnotateIgnoreReadsBegin) AnnotateIgnoreReadsBegin("", 0), AnnotateIgnoreWritesBegin("", 0);
  }
  ~Quiet() {
    if (AnnotateIgnoreReadsEnd) AnnotateIgnoreWritesEnd("", 0), AnnotateIgnoreReadsEnd("", 0);
  }
};

void release(void* token) {
  if (__tsan_release) __tsan_release(token);
}
void acquire(void* token) {
  if (__tsan_acquire) __tsan_acquire(token);
}

// Stacks.

struct Context {
  void* jump[5];  // __builtin_setjmp's: a few registers, without the system call of swapcontext
  char* stack = nullptr;
  size_t size = 0;
  void *tsan = nullptr, *fake = nullptr;
};

[[noreturn, gnu::noinline]] void jump(Context& to) { __builtin_longjmp(to.jump, 1); }

// `from` goes on when somebody changes to it.
[[gnu::noinline]] void change(Context& from, Context& to) {
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, 1);  // 1: a switch orders nothing
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&from.fake, to.stack, to.size);
  if (!__builtin_setjmp(from.jump)) jump(to);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}

// Threads, blocks and the grid.

struct Block;

struct Fiber : Thread, Context {
  Block* block = nullptr;
  uint64_t priority = 0;  // the least first
  bool done = false;
  const char* waiting = nullptr;
  Line at;
};

struct Barrier {
  unsigned expected = 0, arrived = 0, phase = 0;
  int sum = 0, result[2] = {};
  char token[2];  // in turn: who comes early to the next phase must not order what belongs to this one
  Line at;
  std::vector<Fiber*> waiting;
};

// A collective of some lanes of a warp. The next one may begin before all have left.
struct Exchange {
  unsigned mask = 0, arrived = 0, left = 0;
  Warp kind{};
  char token;
  Line at;
  uint64_t value[32];
  std::vector<Fiber*> waiting;
};

// An OS thread and the block that it runs now.
struct Block {
  std::binary_semaphore go{0}, back{0};
  std::thread thread;
  enum { set_up, run, quit } order = set_up;
  Context home;            // the OS thread's own stack
  char* shared = nullptr;  // __shared__ variables
  size_t shared_size = 0;
  std::deque<Fiber> fibers;
  std::vector<char*> stacks;

  unsigned threads = 0, live = 0;
  uint3 index{};
  std::vector<Fiber*> ready;
  size_t head = 0;   // of `ready`
  size_t turns = 0;  // given away since somebody got on
  std::deque<std::deque<Exchange>> warps;
  Barrier barrier, *cluster = nullptr;
  std::vector<Block*>* peers = nullptr;  // of its cluster
  unsigned rank = 0;                     // among them
  char* dynamic = nullptr;
  size_t dynamic_size = 0;
  char began, ended;

  Block();
  ~Block();
  Fiber* next();
  void die();
};

struct Grid {
  Grid(const Launch& launch, const std::function<void()>& thread) : launch(launch), thread(thread) {}
  const Launch& launch;
  const std::function<void()>& thread;
  Barrier barrier;
  std::mt19937_64 random{seed};
  std::string error;
  unsigned long spins = 0;   // turns given away since somebody got on
  unsigned long events = 0;  // changes of the running thread
  char ended;
  std::vector<void*> used;  // ThreadSanitizer's fibers: one that serves two threads of a launch would pass for one
}* grid;

std::vector<void*> spare;  // used ones of earlier launches: to make one takes as long as thousands of its instructions

Block* block;  // that runs
ucontext_t birth_place;
Fiber* born;

Fiber& self() { return static_cast<Fiber&>(*running); }

std::string place(Line line) { return std::string(line.file_name()) + ":" + std::to_string(line.line()); }
bool same(Line a, Line b) { return a.line() == b.line() && a.column() == b.column() && a.file_name() == b.file_name(); }
std::string name(const Fiber& f) {
  const uint3 i = f.block->index;
  const dim3 n = grid->launch.grid;
  return "block " + std::to_string(i.x + n.x * (i.y + n.y * i.z)) + " thread " + std::to_string(f.linear);
}

// Scheduling.

Fiber* Block::next() {
  const size_t n = ready.size() - head;
  if (n == 0 || !grid->error.empty()) return nullptr;
  size_t chosen = head;
  if (seed % 2 && !turns) {
    for (size_t i = head; i < ready.size(); ++i)
      if (ready[i]->priority < ready[chosen]->priority) chosen = i;
  } else if (seed) {
    chosen += grid->random() % n;
  }
  std::swap(ready[head], ready[chosen]);
  Fiber* f = ready[head++];
  if (head == ready.size() || head > 4096) {
    Quiet quiet;
    ready.erase(ready.begin(), ready.begin() + long(head));
    head = 0;
  }
  return f;
}

void enter(Fiber& f) {
  running = &f;
  threadIdx = f.index;
  ++grid->events;
}

// The running thread stops here, until it is in `ready` and chosen.
void leave(bool home = false) {
  Fiber& f = self();
  Fiber* next = home ? nullptr : f.block->next();
  if (next == &f) return;
  if (next) enter(*next);
  change(f, next ? static_cast<Context&>(*next) : f.block->home);
}

void get_on() { grid->spins = block->turns = 0; }

void wake(std::vector<Fiber*>& waiting) {
  for (Fiber* f : waiting) {
    f->waiting = nullptr;
    f->block->ready.push_back(f);
  }
  waiting.clear();
  get_on();
}

void stop(const char* what, Line line, std::vector<Fiber*>& waiting) {
  Fiber& f = self();
  f.waiting = what;
  f.at = line;
  {
    Quiet quiet;
    waiting.push_back(&f);
  }
  leave();
}

// The life of a stack: one CUDA thread after another.
void live() {
  Fiber& f = *born;
  ucontext_t unused;
  if (!__builtin_setjmp(f.jump)) swapcontext(&unused, &birth_place);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
  for (;;) {
    acquire(&f.block->began);
    grid->thread();
    release(&grid->ended);
    release(&f.block->ended);
    f.done = true;
    get_on();
    if (--f.block->live == 0) f.block->die();
    leave();
  }
}

// Whoever still reads shared memory of a block that has ended reads NaN.
void Block::die() {
  if (peers->size() == 1) return;
  acquire(&ended);
  if (__tsan_write_range) {
    __tsan_write_range(shared, shared_size);
    __tsan_write_range(dynamic, dynamic_size);
  }
  Quiet quiet;
  std::memset(shared, kPoison, shared_size);
  std::memset(dynamic, kPoison, dynamic_size);
}

// The OS thread of a block.

thread_local char anchor;  // its address makes the loader allocate this module's thread-local memory

int find_shared(dl_phdr_info* module, size_t, void* of) {
  const auto here = reinterpret_cast<uintptr_t>(&seed);
  bool found = false;
  for (int i = 0; i < module->dlpi_phnum; ++i) {
    const auto& h = module->dlpi_phdr[i];
    const uintptr_t from = module->dlpi_addr + h.p_vaddr;
    found |= h.p_type == PT_LOAD && here >= from && here < from + h.p_memsz;
  }
  for (int i = 0; found && i < module->dlpi_phnum; ++i)
    if (const auto& h = module->dlpi_phdr[i]; h.p_type == PT_TLS) {
      Block& b = *static_cast<Block*>(of);
      b.shared = static_cast<char*>(module->dlpi_tls_data) + h.p_filesz;
      b.shared_size = h.p_memsz - h.p_filesz;
    }
  return found;
}

void add_fibers(Block& b, size_t n) {
  const size_t more = n - b.fibers.size();
  auto* stack = static_cast<char*>(
      mmap(nullptr, more * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (stack == MAP_FAILED) throw std::bad_alloc();
  for (size_t i = 0; i < more; ++i, stack += kStack) {
    Fiber& f = b.fibers.emplace_back();
    f.block = &b;
    f.stack = stack;
    f.size = kStack;
    b.stacks.push_back(stack);
    ucontext_t start;
    getcontext(&start);
    start.uc_stack.ss_sp = stack;
    start.uc_stack.ss_size = kStack;
    start.uc_link = nullptr;
    makecontext(&start, live, 0);
    born = &f;
    swapcontext(&birth_place, &start);
  }
}

void set_up(Block& b) {
  const Launch& l = grid->launch;
  if (b.fibers.size() < b.threads) add_fibers(b, b.threads);
  b.live = b.threads;
  b.ready.clear();
  b.head = b.turns = 0;
  b.barrier = Barrier{};
  b.barrier.expected = b.threads;
  b.warps.resize((b.threads + 31) / 32);
  std::memset(b.shared, kPoison, b.shared_size);
  std::free(b.dynamic);  // malloc's 16 bytes of alignment and no more, and the sanitizers' marks around it
  b.dynamic = static_cast<char*>(std::malloc(l.shared));
  b.dynamic_size = l.shared;
  std::memset(b.dynamic, kPoison, l.shared);
  release(&b.began);
  uint64_t warp = 0;
  for (unsigned t = 0; t < b.threads; ++t) {
    Fiber& f = b.fibers[t];
    static_cast<Thread&>(f) =
        Thread{.index = {t % l.block.x, t / l.block.x % l.block.y, t / l.block.x / l.block.y}, .linear = t};
    f.done = false;
    f.waiting = nullptr;
    if (t % 32 == 0) warp = grid->random() >> 40;
    f.priority = seed == 1 ? b.threads - t : warp * 32 + grid->random() % 32;
    if (__tsan_create_fiber) {
      if (spare.empty()) spare.push_back(__tsan_create_fiber(0));
      f.tsan = spare.back();
      spare.pop_back();
      __tsan_set_fiber_name(f.tsan, ("CUDA " + name(f)).c_str());
      grid->used.push_back(f.tsan);
    }
    b.ready.push_back(&f);
  }
}

void work(Block* mine) {
  Block& b = *mine;
  Quiet quiet;
  anchor = 0;
  asm volatile("" ::"r"(&anchor) : "memory");
  dl_iterate_phdr(find_shared, &b);
  if (__tsan_get_current_fiber) b.home.tsan = __tsan_get_current_fiber();
  pthread_attr_t attributes;
  pthread_getattr_np(pthread_self(), &attributes);
  void* stack;
  pthread_attr_getstack(&attributes, &stack, &b.home.size);
  b.home.stack = static_cast<char*>(stack);
  pthread_attr_destroy(&attributes);
  for (;;) {
    b.go.acquire();
    if (b.order == Block::quit) return;
    if (b.order == Block::set_up) {
      set_up(b);
    } else {
      block = &b;
      blockIdx = b.index;
      if (Fiber* first = b.next()) {
        enter(*first);
        change(b.home, *first);
      }
    }
    b.back.release();
  }
}

Block::Block() { thread = std::thread(work, this); }
Block::~Block() {
  order = quit;
  go.release();
  thread.join();
  std::free(dynamic);
  for (char* stack : stacks) munmap(stack, kStack);
}

// Never destroyed: at exit its threads may be gone. Under ThreadSanitizer each block is a new one, as all that was done
// in the same memory before would be a race.
std::vector<Block*>& blocks = *new std::vector<Block*>;

void pass_baton(Block& b, decltype(Block::order) order) {
  b.order = order;
  b.go.release();
  b.back.acquire();
}

std::string deadlock(const std::vector<Block*>& batch) {
  std::string text = "deadlock:";
  int shown = 0;
  for (const Block* b : batch) {
    if (b->live == 0) continue;
    for (unsigned t = 0; t < b->threads; ++t)
      if (const Fiber& f = b->fibers[t]; !f.done && ++shown <= 4)
        text += "\n  " + name(f) + " waits for " + f.waiting + " at " + place(f.at);
    if (b->live < b->threads)
      text += "\n  " + std::to_string(b->threads - b->live) + " of " + std::to_string(b->threads) +
              " threads of this block have returned";
  }
  return text;
}

// Blocks that must be there at the same time; or the next one, alone.
void run(const std::vector<Block*>& batch) {
  for (Block* b : batch) pass_baton(*b, Block::set_up);
  std::vector<Block*> turn = batch;
  if (seed == 1) std::reverse(turn.begin(), turn.end());
  const auto alive = [](const Block* b) { return b->live > 0; };
  while (std::any_of(batch.begin(), batch.end(), alive)) {
    const unsigned long before = grid->events;
    if (seed > 1) std::shuffle(turn.begin(), turn.end(), grid->random);
    for (Block* b : turn)
      if (alive(b) && grid->error.empty()) pass_baton(*b, Block::run);
    if (grid->error.empty() && grid->events == before) grid->error = deadlock(batch);
    if (!grid->error.empty()) return;
  }
}

}  // namespace

std::string run(const Launch& l, const std::function<void()>& thread) {
  Quiet quiet;
  Grid g(l, thread);
  grid = &g;
  blockDim = l.block;
  gridDim = l.grid;
  const unsigned n = l.grid.x * l.grid.y * l.grid.z, threads = l.block.x * l.block.y * l.block.z, size = l.cluster.x;
  const unsigned together = l.cooperative ? n : size;
  g.barrier.expected = n * threads;
  std::vector<unsigned> order(n / together);
  for (unsigned i = 0; i < order.size(); ++i) order[i] = seed == 1 ? unsigned(order.size()) - 1 - i : i;
  if (seed > 1) std::shuffle(order.begin(), order.end(), g.random);
  for (const unsigned o : order) {
    while (blocks.size() < together) blocks.push_back(new Block);
    const std::vector<Block*> batch(blocks.begin(), blocks.begin() + together);
    std::vector<Barrier> barriers(together / size);
    std::vector<std::vector<Block*>> clusters(together / size);
    for (unsigned i = 0; i < together; ++i) {
      Block& b = *batch[i];
      const unsigned id = o * together + i;
      b.threads = threads;
      b.index = {id % l.grid.x, id / l.grid.x % l.grid.y, id / l.grid.x / l.grid.y};
      b.cluster = &barriers[i / size];
      b.cluster->expected = size * threads;
      b.peers = &clusters[i / size];
      b.peers->push_back(&b);
      b.rank = i % size;
    }
    run(batch);
    if (__tsan_create_fiber) {
      for (Block* b : blocks) delete b;
      blocks.clear();
      if (g.used.size() > 4000) spare.swap(g.used);
    }
    if (!g.error.empty()) break;
  }
  for (void* f : g.used) {
    if (g.error.empty()) {
      spare.push_back(f);
      continue;
    }
    // What they did before the error is done; they stand where they failed.
    void* here = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f, 1);
    release(&g.ended);
    __tsan_switch_to_fiber(here, 1);
    __tsan_destroy_fiber(f);
  }
  acquire(&g.ended);
  grid = nullptr;
  if (!g.error.empty()) blocks.clear();  // their threads stand where they failed, for ever
  return g.error;
}

// What kernels call.

void fail(const char* what, Line line) {
  {
    Quiet quiet;
    grid->error = std::string(what) + " at " + place(line) + ", " + name(self());
  }
  for (;;) leave(true);
}

void give_way() {
  Block& b = *block;
  ++b.turns;
  if (++grid->spins > kLivelock) fail("livelock: threads only spin", Line::current());
  {
    Quiet quiet;
    b.ready.push_back(&self());
  }
  leave(b.turns > 2 * (b.ready.size() - b.head) + 2);  // all of them spin: another block's turn
}

Barrier& barrier_of(Scope scope) {
  return scope == Scope::block ? block->barrier : scope == Scope::cluster ? *block->cluster : grid->barrier;
}

unsigned arrive(Scope scope, Vote vote, bool value, Line line) {
  if (scope == Scope::grid && !grid->launch.cooperative) fail("grid barrier in a launch that is not cooperative", line);
  Barrier& b = barrier_of(scope);
  if (b.arrived == 0) {
    b.at = line;
    b.sum = vote == Vote::all;
  } else if (!same(b.at, line)) {
    fail("divergent barrier: others of the group are at another one; this one is", line);
  }
  switch (vote) {
    case Vote::none: break;
    case Vote::any: b.sum |= value; break;
    case Vote::all: b.sum &= value; break;
    case Vote::count: b.sum += value; break;
  }
  const unsigned phase = b.phase;
  release(&b.token[phase % 2]);
  if (++b.arrived == b.expected) {
    Quiet quiet;
    b.result[phase % 2] = b.sum;
    b.arrived = 0;
    ++b.phase;
    wake(b.waiting);
  }
  return phase;
}

int wait(Scope scope, unsigned phase, Line line) {
  Barrier& b = barrier_of(scope);
  if (b.phase == phase) {
    stop(scope == Scope::block     ? "a block barrier"
         : scope == Scope::cluster ? "a cluster barrier"
                                   : "a grid barrier",
         line, b.waiting);
  } else if (seed) {  // the last to come is not always the first to go on
    {
      Quiet quiet;
      block->ready.push_back(&self());
    }
    leave();
  }
  acquire(&b.token[phase % 2]);
  return b.result[phase % 2];
}

const uint64_t* exchange(unsigned mask, Warp kind, uint64_t value, Line line) {
  Fiber& f = self();
  const unsigned lane = f.lane();
  if (!(mask >> lane & 1)) fail("warp collective by a lane outside its mask", line);
  auto& warp = block->warps[f.linear / 32];
  Exchange *e = nullptr, *free = nullptr;
  for (Exchange& other : warp) {
    if (other.left == other.mask)
      free = &other;
    else if (other.arrived == other.mask)
      continue;
    else if (other.mask == mask)
      e = &other;
    else if (other.mask & mask)
      fail("warp collectives with overlapping, unequal masks", line);
  }
  if (!e) {
    if (!free) {
      Quiet quiet;
      free = &warp.emplace_back();
    }
    e = free;
    e->mask = mask;
    e->arrived = e->left = 0;
    e->kind = kind;
    e->at = line;
  } else if (e->kind != kind || !same(e->at, line)) {
    fail("lanes of one mask meet in different warp collectives", line);
  }
  if (kind == Warp::sync) release(&e->token);
  e->value[lane] = value;
  e->arrived |= 1u << lane;
  if (e->arrived == mask) {
    Quiet quiet;
    wake(e->waiting);
  } else {
    stop("a warp collective", line, e->waiting);
  }
  if (kind == Warp::sync) acquire(&e->token);
  e->left |= 1u << lane;
  return e->value;
}

unsigned cluster_rank() { return block->rank; }
unsigned cluster_size() { return unsigned(block->peers->size()); }

void* map_shared(const void* mine, unsigned rank, Line line) {
  if (rank >= cluster_size()) fail("map_shared_rank of a block that the cluster does not have", line);
  const auto* p = static_cast<const char*>(mine);
  const Block &from = *block, &to = *(*from.peers)[rank];
  if (to.live == 0) fail("map_shared_rank of a block that has ended", line);
  if (p >= from.shared && p < from.shared + from.shared_size) return to.shared + (p - from.shared);
  if (p < from.dynamic || p > from.dynamic + from.dynamic_size)
    fail("map_shared_rank of other than shared memory", line);
  return to.dynamic + (p - from.dynamic);
}

}  // namespace emu

void* fn_emu_dynamic_shared() { return emu::block->dynamic; }
