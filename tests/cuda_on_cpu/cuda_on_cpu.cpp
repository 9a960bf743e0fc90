// The fiber scheduler behind cuda_runtime.h: runs the threads of one block after another, one at a
// time.
//
// A fiber is ready, waits at the block's barrier, waits in a warp operation, or is finished. The
// operation's last arrival makes all its members ready again. No fiber ready before all have
// finished: a deadlock.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "cuda_runtime.h"

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace cuda_on_cpu {

Thread* current = nullptr;
dim3 block_size;
dim3 grid_size;

namespace {

constexpr unsigned kWarp = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = 232448;  // an H100's opt-in limit
constexpr size_t kStackBytes = 256 * 1024;

// A suspended thread of control. swapcontext would do everywhere but makes a system call at each
// switch.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};

extern "C" void cuda_on_cpu_switch(void** save, void* load);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_cpu_switch, .-cuda_on_cpu_switch
)");

void prepare(Context& context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStackBytes);
  *--top = nullptr;  // the return address that `entry` never uses; the ABI wants it at 8 modulo 16
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  context.stack_pointer = top;
}

void switch_context(Context& from, Context& to) {
  cuda_on_cpu_switch(&from.stack_pointer, to.stack_pointer);
}
#else
struct Context {
  ucontext_t state;
};

void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.state);
  context.state.uc_stack.ss_sp = stack;
  context.state.uc_stack.ss_size = kStackBytes;
  context.state.uc_link = nullptr;
  makecontext(&context.state, entry, 0);
}

void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

// Stacks live as long as the process; below each lies a page that faults.
class Stacks {
 public:
  char* operator[](unsigned index) {
    while (stacks_.size() <= index) {
      const size_t page = sysconf(_SC_PAGESIZE);
      void* memory = mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::bad_alloc();
      mprotect(memory, page, PROT_NONE);
      stacks_.push_back(static_cast<char*>(memory) + page);
    }
    return stacks_[index];
  }

  // Frames abandoned by a failed launch leave poisoned redzones behind.
  void unpoison() {
#if defined(__SANITIZE_ADDRESS__)
    for (char* stack : stacks_) ASAN_UNPOISON_MEMORY_REGION(stack, kStackBytes);
#endif
  }

 private:
  std::vector<char*> stacks_;
};

enum class State { kReady, kBarrier, kExchange, kFinished };

struct Fiber : Thread {
  unsigned index;
  State state;
  Context context;
  char* stack;
  void* fake_stack;  // AddressSanitizer's
  // What it waits for.
  const char* operation;
  Site site;
  unsigned mask;
  uint64_t value;
  unsigned source;
  Exchange result;
};

std::mutex launch_mutex;
Stacks stacks;
std::vector<Fiber> fibers;
std::vector<Fiber*> ready;
unsigned at_barrier;
unsigned finished;
const std::function<void()>* kernel_body;
std::unique_ptr<unsigned char[]> shared;
Context scheduler;
void* scheduler_fake_stack;
const void* scheduler_stack;
size_t scheduler_stack_bytes;
std::string failure;

uint64_t random_state;

// splitmix64
uint64_t next_random() {
  uint64_t x = random_state += 0x9e3779b97f4a7c15u;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

Fiber& self() { return *static_cast<Fiber*>(current); }

void before_switch(void** fake_stack, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

void after_switch(void* fake_stack, const void** from_stack, size_t* from_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from_stack, from_bytes);
#else
  (void)fake_stack, (void)from_stack, (void)from_bytes;
#endif
}

void resume(Fiber& fiber) {
  current = &fiber;
  before_switch(&scheduler_fake_stack, fiber.stack, kStackBytes);
  switch_context(scheduler, fiber.context);
  after_switch(scheduler_fake_stack, nullptr, nullptr);
}

void suspend() {
  Fiber& fiber = self();
  // A fiber that has finished gives its fake stack up.
  before_switch(fiber.state == State::kFinished ? nullptr : &fiber.fake_stack, scheduler_stack,
                scheduler_stack_bytes);
  switch_context(fiber.context, scheduler);
  after_switch(fiber.fake_stack, nullptr, nullptr);
}

void run_thread() {
  after_switch(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*kernel_body)();
  self().state = State::kFinished;
  ++finished;
  suspend();
  std::abort();
}

std::string describe(uint3 v) {
  return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")";
}

std::string describe(const char* operation, Site site) {
  return std::string(operation) + " at " + site.file + ":" + std::to_string(site.line);
}

[[noreturn]] void fail(const std::string& message) {
  failure = "block " + describe(self().block_index) + ", thread " + describe(self().thread_index) +
            ": " + message;
  suspend();
  std::abort();
}

bool same(Site a, Site b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

void make_ready(Fiber& fiber) {
  fiber.state = State::kReady;
  ready.push_back(&fiber);
}

// Warp after warp, from a random one on.
void make_all_ready() {
  const size_t warps = (fibers.size() + kWarp - 1) / kWarp;
  const size_t first = next_random() % warps * kWarp;
  for (size_t i = first; i < fibers.size(); ++i) make_ready(fibers[i]);
  for (size_t i = 0; i < first; ++i) make_ready(fibers[i]);
}

std::string describe_deadlock() {
  std::map<std::string, unsigned> counts;
  for (const Fiber& fiber : fibers) {
    ++counts[fiber.state == State::kFinished ? "have finished"
                                             : "wait in " + describe(fiber.operation, fiber.site)];
  }
  std::string message = "block " + describe(fibers[0].block_index) + ": deadlock";
  for (const auto& [what, count] : counts) {
    message += "; " + std::to_string(count) + " threads " + what;
  }
  return message;
}

uint3 unflatten(uint64_t index, dim3 size) {
  return {static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
          static_cast<unsigned>(index / size.x / size.y)};
}

void run_block(uint64_t block, size_t shared_bytes) {
  std::memset(shared.get(), 0xff, shared_bytes);
  at_barrier = 0;
  finished = 0;
  ready.clear();
  for (Fiber& fiber : fibers) {
    fiber.index = static_cast<unsigned>(&fiber - fibers.data());
    fiber.thread_index = unflatten(fiber.index, block_size);
    fiber.block_index = unflatten(block, grid_size);
    fiber.stack = stacks[fiber.index];
    fiber.fake_stack = nullptr;
    prepare(fiber.context, fiber.stack, run_thread);
  }
  make_all_ready();
  // Some blocks draw from all threads; in others a warp runs as far ahead of the rest as it can,
  // because the threads that became ready last go first.
  const size_t window = next_random() % 2 == 0 ? fibers.size() : kWarp;
  while (!ready.empty() && failure.empty()) {
    const size_t back = next_random() % std::min(window, ready.size());
    std::swap(ready[ready.size() - 1 - back], ready.back());
    Fiber& fiber = *ready.back();
    ready.pop_back();
    resume(fiber);
  }
  if (failure.empty() && finished < fibers.size()) failure = describe_deadlock();
}

}  // namespace

void* shared_memory() { return shared.get(); }

unsigned lane() { return self().index % kWarp; }

void synchronize_block(Site site) {
  Fiber& me = self();
  for (const Fiber& other : fibers) {
    if (other.state != State::kBarrier) continue;
    if (!same(other.site, site)) {
      fail(describe("__syncthreads", site) + ", where another thread waits in " +
           describe("__syncthreads", other.site));
    }
    break;  // all that wait have been compared with one another
  }
  me.state = State::kBarrier;
  me.operation = "__syncthreads";
  me.site = site;
  if (++at_barrier == fibers.size()) {
    at_barrier = 0;
    make_all_ready();
  }
  suspend();
}

Exchange exchange(unsigned mask, uint64_t value, unsigned source, const char* operation,
                  Site site) {
  Fiber& me = self();
  if ((mask >> lane() & 1) == 0)
    fail(describe(operation, site) + ": the caller is not in its mask");
  me.state = State::kExchange;
  me.operation = operation;
  me.site = site;
  me.mask = mask;
  me.value = value;
  me.source = source;

  const unsigned base = me.index - lane();
  bool complete = true;
  unsigned ballot = 0;
  for (unsigned l = 0; l < kWarp; ++l) {
    if ((mask >> l & 1) == 0) continue;
    if (base + l >= fibers.size()) fail(describe(operation, site) + ": its mask names no thread");
    const Fiber& other = fibers[base + l];
    if (other.state != State::kExchange) {
      complete = false;
      continue;
    }
    if (other.mask != mask || std::strcmp(other.operation, operation) != 0 ||
        !same(other.site, site)) {
      fail(describe(operation, site) + ", where a lane of its mask is in " +
           describe(other.operation, other.site));
    }
    if (other.value != 0) ballot |= 1u << l;
  }
  if (complete) {
    for (unsigned l = 0; l < kWarp; ++l) {
      if ((mask >> l & 1) == 0) continue;
      Fiber& member = fibers[base + l];
      const bool known = member.source < kWarp && (mask >> member.source & 1) != 0;
      member.result = {known ? fibers[base + member.source].value : ~uint64_t{0}, ballot};
      make_ready(member);
    }
  }
  suspend();
  return me.result;
}

cudaError_t launch(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(launch_mutex);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (blocks == 0 || grid.x > INT_MAX || grid.y > 65535 || grid.z > 65535 || threads == 0 ||
      threads > kMaxThreads || shared_bytes > kMaxSharedBytes) {
    return cudaErrorInvalidValue;
  }
  const char* seed = std::getenv("CUDA_ON_CPU_SEED");
  random_state = seed == nullptr ? 0 : std::strtoull(seed, nullptr, 10);
  failure.clear();
  grid_size = grid;
  block_size = block;
  kernel_body = &kernel;
  shared.reset(new unsigned char[shared_bytes]);
  fibers.resize(threads);
  const uint64_t first_block = next_random() % blocks;
  for (uint64_t i = 0; i < blocks && failure.empty(); ++i) {
    run_block((first_block + i) % blocks, shared_bytes);
  }
  shared.reset();
  if (failure.empty()) return cudaSuccess;
  stacks.unpoison();
  return cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorLaunchFailure:
      return cuda_on_cpu::failure.c_str();
  }
  return "unrecognized error code";
}
