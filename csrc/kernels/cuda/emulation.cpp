#include "kernels/cuda/emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

namespace fastprune::emulation {

Position position;

namespace {

constexpr size_t kStackBytes = size_t{128} << 10;
constexpr size_t kPage = 4096;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kMaxSharedBytes = size_t{227} << 10;

enum class State { ready, at_barrier, at_exchange, done };

struct Copy {
  void* to;
  const void* from;
  int bytes, read;
};

struct Fiber {
  void* stack_pointer = nullptr;
  dim3 thread;
  State state = State::done;
  unsigned exchange_mask = 0;
  uint64_t brought = 0;
  uint64_t all[32] = {};
  std::vector<std::vector<Copy>> committed;
  std::vector<Copy> open;
};

struct Machine {
  std::mutex busy;
  std::vector<Fiber> fibers = std::vector<Fiber>(kMaxThreads);
  char* stacks = nullptr;
  void* scheduler_stack = nullptr;
  unsigned running = 0, count = 0;
  const std::function<void()>* kernel = nullptr;
  std::vector<char> shared;
  char* shared_begin = nullptr;
  std::mt19937_64 order;
  uint64_t seed = 0;
  int multiprocessors = 4;
  char failure[160] = "no error";
};
Machine machine;

#if defined(__x86_64__)
// Pushes the registers that a callee keeps, swaps stacks, pops the other fiber's.
extern "C" void fastprune_switch_stack(void** save, void* load);
asm(R"(
  .text
  .type fastprune_switch_stack, @function
fastprune_switch_stack:
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
  .size fastprune_switch_stack, .-fastprune_switch_stack
)");
#else
#error "The emulation of CUDA blocks is written for x86-64."
#endif

void fail(const char* why) {
  if (std::strcmp(machine.failure, "no error") == 0) {
    std::snprintf(machine.failure, sizeof machine.failure, "emulated launch: %s (block %u, %u, %u)",
                  why, position.block.x, position.block.y, position.block.z);
  }
}

void to_scheduler() {
  Fiber& self = machine.fibers[machine.running];
  fastprune_switch_stack(&self.stack_pointer, machine.scheduler_stack);
}

void finish_copies(Fiber& fiber, size_t groups_left) {
  while (fiber.committed.size() > groups_left) {
    for (const Copy& c : fiber.committed.front()) {
      std::memcpy(c.to, c.from, static_cast<size_t>(c.read));
      std::memset(static_cast<char*>(c.to) + c.read, 0, static_cast<size_t>(c.bytes - c.read));
    }
    fiber.committed.erase(fiber.committed.begin());
  }
}

void enter() {
  (*machine.kernel)();
  Fiber& self = machine.fibers[machine.running];
  if (!self.open.empty() || !self.committed.empty()) fail("a thread ended before its copies did");
  self.open.clear();
  self.committed.clear();
  self.state = State::done;
  to_scheduler();
  std::abort();  // a fiber that is done is never resumed
}

void prepare(unsigned i) {
  Fiber& fiber = machine.fibers[i];
  // The layout that fastprune_switch_stack pops: six registers, then the address to return to.
  char* top = machine.stacks + (i + 1) * kStackBytes;
  void** sp = reinterpret_cast<void**>(top) - 1;
  *sp = nullptr;  // keeps the stack aligned as after a call
  *--sp = reinterpret_cast<void*>(&enter);
  for (int r = 0; r < 6; ++r) *--sp = nullptr;
  fiber.stack_pointer = sp;
  fiber.state = State::ready;
}

void resume(unsigned i) {
  machine.running = i;
  position.thread = machine.fibers[i].thread;
  fastprune_switch_stack(&machine.scheduler_stack, machine.fibers[i].stack_pointer);
}

// Gives all lanes of a mask their values once the last one is there.
void complete_exchange(unsigned i) {
  const unsigned first = i / 32 * 32;
  const unsigned mask = machine.fibers[i].exchange_mask;
  if ((mask >> (i % 32) & 1u) == 0) {
    fail("a lane calls a collective whose mask leaves it out");
    return;
  }
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    if (first + l >= machine.count) {
      fail("the mask of a collective names lanes that do not exist");
      return;
    }
    const Fiber& other = machine.fibers[first + l];
    if (other.state != State::at_exchange || other.exchange_mask != mask) return;
  }
  uint64_t all[32];
  for (unsigned l = 0; l < 32; ++l) {
    const bool there = (mask >> l & 1u) != 0;
    all[l] = there ? machine.fibers[first + l].brought : 0xa5a5a5a5a5a5a5a5u;
  }
  for (unsigned l = 0; l < 32; ++l) {
    if ((mask >> l & 1u) == 0) continue;
    std::memcpy(machine.fibers[first + l].all, all, sizeof all);
    machine.fibers[first + l].state = State::ready;
  }
}

bool release_barrier() {
  bool any = false;
  for (unsigned i = 0; i < machine.count; ++i) {
    const State state = machine.fibers[i].state;
    if (state == State::at_exchange) return false;
    any = any || state == State::at_barrier;
  }
  for (unsigned i = 0; any && i < machine.count; ++i) {
    if (machine.fibers[i].state == State::at_barrier) machine.fibers[i].state = State::ready;
  }
  return any;
}

void run_block() {
  std::memset(machine.shared_begin, 0xff, kMaxSharedBytes);
  std::vector<unsigned> turn(machine.count);
  std::iota(turn.begin(), turn.end(), 0u);
  for (unsigned i = 0; i < machine.count; ++i) prepare(i);
  // In every other block, half of the warps wait for some rounds: others run ahead of them by
  // several collectives.
  const bool uneven = machine.seed != 0 && machine.order() % 2 == 0;
  uint64_t waits = 0;  // a bit per warp
  for (;;) {
    if (uneven && machine.order() % 8 == 0) waits = machine.order();
    // Forwards, backwards, or shuffled: races show in the difference.
    const uint64_t how = machine.seed == 0 ? 0 : machine.order() % 3;
    if (how == 1) std::reverse(turn.begin(), turn.end());
    if (how == 2) std::shuffle(turn.begin(), turn.end(), machine.order);
    bool ran = false, alive = false, waiting = false;
    for (const unsigned i : turn) {
      if (machine.fibers[i].state != State::ready) continue;
      if ((waits >> (i / 32) & 1u) != 0) {
        waiting = true;
        continue;
      }
      ran = true;
      resume(i);
      if (machine.fibers[i].state == State::at_exchange) complete_exchange(i);
    }
    for (const unsigned i : turn) alive = alive || machine.fibers[i].state != State::done;
    if (!alive) return;
    if (!ran && !waiting && !release_barrier()) {
      fail("deadlock: threads wait for each other at different barriers or collectives");
      return;
    }
  }
}

}  // namespace

cudaError_t run(dim3 grid, dim3 block, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  std::snprintf(machine.failure, sizeof machine.failure, "no error");
  position = Position{dim3(0, 0, 0), dim3(0, 0, 0), block, grid};
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads < 1 || threads > kMaxThreads || shared_bytes > kMaxSharedBytes || grid.x < 1 ||
      grid.x > 2147483647u || grid.y < 1 || grid.y > 65535 || grid.z < 1 || grid.z > 65535) {
    std::snprintf(
        machine.failure, sizeof machine.failure,
        "emulated launch: invalid configuration: grid %u x %u x %u, %u threads, %zu bytes "
        "of shared memory",
        grid.x, grid.y, grid.z, static_cast<unsigned>(threads), shared_bytes);
    return cudaErrorInvalidConfiguration;
  }
  if (machine.stacks == nullptr) {
    void* memory = mmap(nullptr, kStackBytes * kMaxThreads, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return cudaErrorLaunchFailure;
    machine.stacks = static_cast<char*>(memory);
    // The lowest page of each stack is out of bounds.
    for (unsigned i = 0; i < kMaxThreads; ++i) {
      mprotect(machine.stacks + i * kStackBytes, kPage, PROT_NONE);
    }
    machine.shared.resize(kMaxSharedBytes + 1024);
    const uintptr_t begin = reinterpret_cast<uintptr_t>(machine.shared.data());
    machine.shared_begin = reinterpret_cast<char*>((begin + 1023) / 1024 * 1024);
  }
  machine.count = static_cast<unsigned>(threads);
  machine.kernel = &kernel;
  for (unsigned i = 0; i < machine.count; ++i) {
    machine.fibers[i].thread = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
  }
  std::vector<uint64_t> blocks(uint64_t{grid.x} * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t{0});
  if (machine.seed != 0) std::shuffle(blocks.begin(), blocks.end(), machine.order);
  for (const uint64_t b : blocks) {
    position.block =
        dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
             static_cast<unsigned>(b / grid.x / grid.y));
    run_block();
    if (std::strcmp(machine.failure, "no error") != 0) return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

void* shared_memory() { return machine.shared_begin; }

int lane() { return static_cast<int>(machine.running % 32); }

void block_barrier() {
  machine.fibers[machine.running].state = State::at_barrier;
  to_scheduler();
}

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Fiber& self = machine.fibers[machine.running];
  self.exchange_mask = mask;
  self.brought = value;
  self.state = State::at_exchange;
  to_scheduler();
  return self.all;
}

void copy_async(void* to, const void* from, int bytes, int read) {
  machine.fibers[machine.running].open.push_back(Copy{to, from, bytes, read});
}
void commit_copies() {
  Fiber& self = machine.fibers[machine.running];
  self.committed.push_back(std::move(self.open));
  self.open.clear();
}
void wait_for_copies(int groups_left) {
  finish_copies(machine.fibers[machine.running], static_cast<size_t>(groups_left));
}

void configure(uint64_t seed, int multiprocessors) {
  const std::lock_guard<std::mutex> lock(machine.busy);
  machine.seed = seed;
  machine.order.seed(seed);
  machine.multiprocessors = multiprocessors;
}
int multiprocessors() { return machine.multiprocessors; }
const char* last_failure() { return machine.failure; }

}  // namespace fastprune::emulation
