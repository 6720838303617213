// CUDA's blocks, warps, barriers and shuffles on one thread of a CPU, so that the very source of a kernel runs where no
// GPU is. A CUDA thread is a fiber. It runs until it must wait for others (a barrier, a shuffle); then a random other
// one goes on, so that every order which the barriers allow can come up, and one which a missing barrier allows does.
// Blocks run one after another in random order. Shared memory is new and poisoned (0xCD) for every block and comes
// from malloc, so that AddressSanitizer knows its bounds.
//
// Caught: reads before writes across a missing barrier, accesses out of bounds (with -fsanitize=address), a barrier or
// shuffle that some threads never reach, a lane that is not there, a wait that nothing ends. Left out: finer memory
// order, tensor cores and asynchronous copies but where a wrapper emulates them (hopper.h), clusters, speed.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <vector>

#include "device/interface.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FIBER_LEAVES(save, stack, size) __sanitizer_start_switch_fiber(save, stack, size)
#define FIBER_ARRIVES(save) __sanitizer_finish_switch_fiber(save, nullptr, nullptr)
#else
#define FIBER_LEAVES(save, stack, size) (void)0
#define FIBER_ARRIVES(save) (void)0
#endif

namespace emulator {

constexpr std::size_t kStack = 256 << 10;
constexpr int kLanes = 32, kPoison = 0xCD;

struct Index { unsigned x = 0, y = 0, z = 0; };
struct Extent {
  unsigned x = 1, y = 1, z = 1;
  Extent(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  Extent(dim3 from) : x(from.x), y(from.y), z(from.z) {}
};

enum class State { kReady, kAtBarrier, kAtShuffle, kAsleep, kDone };

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* shadow = nullptr;  // AddressSanitizer's
  State state = State::kReady;
  Index thread;
  int number = 0, rounds = 0;  // shuffles so far
  std::deque<std::function<void()>> deferred;  // handed to another engine; an empty one ends a group
};

struct Warp {
  int waiting = 0;
  unsigned char values[2][kLanes][16];  // of this round and of the one before, which some may still read
  unsigned priority = 0;
};

struct Memory {
  std::unique_ptr<unsigned char[]> bytes;
  std::size_t size = 0;
  uint32_t address = 0;  // in the window of shared memory
};

struct Machine {
  std::mutex one_launch;
  std::mt19937 random{0};
  int64_t first_block = 0, last_block = INT64_MAX;  // only these run: tests of sizes that no machine computes whole

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<const void*, Memory> shared;
  std::vector<std::function<void()>> late;  // bytes on their way: they land in any order, at any time,
  unsigned pace = 1;                        // by chance one step in so many, or when nobody can go on without them
  unsigned changes = 0;                     // of what `wait_until` looks at
  std::size_t dynamic_bytes = 0;
  ucontext_t scheduler;
  void *shadow = nullptr;
  const void* home = nullptr;
  std::size_t home_size = 0;
  Fiber* now = nullptr;
  std::function<void()> body;
  std::string error;
  Extent grid, block;
  Index at;
};

inline Machine machine;

inline int lanes_of(int warp) {
  return std::min<int>(kLanes, static_cast<int>(machine.block.x * machine.block.y * machine.block.z) - warp * kLanes);
}

inline void to_scheduler([[maybe_unused]] bool for_good = false) {
  Fiber* self = machine.now;
  FIBER_LEAVES(for_good ? nullptr : &self->shadow, machine.home, machine.home_size);
  swapcontext(&self->context, &machine.scheduler);
  FIBER_ARRIVES(self->shadow);
}

[[noreturn]] inline void fail(const std::string& why) {
  if (machine.error.empty()) machine.error = why;
  machine.now->state = State::kDone;
  to_scheduler(true);
  std::abort();
}

inline void run_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.home, &machine.home_size);
#endif
  machine.body();
  if (!machine.now->deferred.empty()) fail("a thread ends with products that it has not waited for");
  machine.now->state = State::kDone;
  to_scheduler(true);
}

inline void barrier() {
  machine.now->state = State::kAtBarrier;
  to_scheduler();
}

// Waits for what no barrier of all threads tells; who changes it counts `changes` up.
template <class Done>
void wait_until(Done done) {
  while (!done()) {
    machine.now->state = State::kAsleep;
    to_scheduler();
  }
}

// Hands `value` to the warp and waits for its lanes; then the value of any lane can be read by `of_lane`.
template <class T>
void publish(const T& value) {
  static_assert(sizeof(T) <= 16, "a shuffle moves at most 16 bytes");
  Fiber& self = *machine.now;
  Warp& warp = machine.warps[self.number / kLanes];
  std::memcpy(warp.values[self.rounds % 2][self.number % kLanes], &value, sizeof(T));
  self.state = State::kAtShuffle;
  warp.waiting++;
  to_scheduler();
  machine.now->rounds++;
}

template <class T>
T of_lane(int lane) {
  Fiber& self = *machine.now;
  int warp = self.number / kLanes;
  if (lane < 0 || lane >= lanes_of(warp)) fail("a shuffle reads lane " + std::to_string(lane) + ", which is not there");
  T value;
  std::memcpy(&value, machine.warps[warp].values[(self.rounds - 1) % 2][lane], sizeof(T));
  return value;
}

inline void start(Fiber& fiber, int number) {
  if (!fiber.stack) {
    fiber.stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (fiber.stack == MAP_FAILED) throw Refused{"no memory for the stack of a thread"};
  }
  const Extent& block = machine.block;
  unsigned n = static_cast<unsigned>(number);
  fiber.thread = {n % block.x, n / block.x % block.y, n / block.x / block.y};
  fiber.number = number;
  fiber.rounds = 0;
  fiber.deferred.clear();
  fiber.state = State::kReady;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void resume(Fiber& fiber) {
  machine.now = &fiber;
  FIBER_LEAVES(&machine.shadow, fiber.stack, kStack);
  swapcontext(&machine.scheduler, &fiber.context);
  FIBER_ARRIVES(machine.shadow);
}

// A block: the warps in a random order of precedence, drawn anew at every barrier, so that one can run far ahead.
struct Block {
  int threads, done = 0, at_barrier = 0;
  unsigned seen = 0;  // of the changes
  std::vector<int> ready, asleep;

  explicit Block(int threads) : threads(threads), ready(threads) {
    std::iota(ready.begin(), ready.end(), 0);
    machine.warps.assign((threads + kLanes - 1) / kLanes, {});
    machine.shared.clear();
    machine.late.clear();
    for (int n = 0; n < threads; n++) start(machine.fibers[n], n);
    arrange();
  }

  void arrange() {
    for (Warp& warp : machine.warps) warp.priority = machine.random();
    std::shuffle(ready.begin(), ready.end(), machine.random);
    std::stable_sort(ready.begin(), ready.end(), [](int a, int b) {
      return machine.warps[a / kLanes].priority < machine.warps[b / kLanes].priority;
    });
  }

  void go_on(std::vector<int> numbers) {
    std::shuffle(numbers.begin(), numbers.end(), machine.random);
    for (int n : numbers) machine.fibers[n].state = State::kReady;
    ready.insert(machine.random() % 4 ? ready.end() : ready.begin(), numbers.begin(), numbers.end());
  }

  void open_barrier() {
    ready.resize(threads);
    std::iota(ready.begin(), ready.end(), 0);
    for (int n : ready) machine.fibers[n].state = State::kReady;
    at_barrier = 0;
    arrange();
  }

  // What happens beside the threads: bytes land, and who waits for a change looks again.
  void beside(bool stuck) {
    if (!machine.late.empty() && (stuck || machine.random() % machine.pace == 0)) {
      std::swap(machine.late[machine.random() % machine.late.size()], machine.late.back());
      const auto land = std::move(machine.late.back());
      machine.late.pop_back();
      land();
    }
    if (!asleep.empty() && seen != machine.changes && (stuck || machine.random() % 8 == 0)) {
      seen = machine.changes;
      go_on(std::exchange(asleep, {}));
    }
  }

  void step(int number) {
    Fiber& fiber = machine.fibers[number];
    resume(fiber);
    if (!machine.error.empty()) throw Refused{std::exchange(machine.error, "")};
    done += fiber.state == State::kDone;
    at_barrier += fiber.state == State::kAtBarrier;
    if (fiber.state == State::kAsleep) asleep.push_back(number);
    Warp& warp = machine.warps[number / kLanes];
    if (fiber.state == State::kAtShuffle && warp.waiting == lanes_of(number / kLanes)) {
      warp.waiting = 0;
      std::vector<int> lanes(lanes_of(number / kLanes));
      std::iota(lanes.begin(), lanes.end(), number / kLanes * kLanes);
      go_on(lanes);
    }
  }

  void run() {
    while (done < threads) {
      const bool all_there = ready.empty() && at_barrier == threads;
      beside(ready.empty() && !all_there);
      if (all_there) open_barrier();
      if (ready.empty()) hangs();
      const int number = ready.back();
      ready.pop_back();
      step(number);
    }
    if (!machine.late.empty())
      throw Refused{"a block ends while copies are on their way to it: " + std::to_string(machine.late.size())};
  }

  void hangs() const {
    const std::size_t shuffling = threads - at_barrier - done - asleep.size();
    throw Refused{"a block hangs: " + std::to_string(at_barrier) + " of its " + std::to_string(threads) +
                  " threads wait at a barrier, " + std::to_string(done) + " have ended, " + std::to_string(shuffling) +
                  " wait at a shuffle, " + std::to_string(asleep.size()) + " at an mbarrier"};
  }
};

inline void launch(Extent grid, Extent block, std::size_t dynamic_bytes, std::function<void()> body) {
  std::lock_guard<std::mutex> lock(machine.one_launch);
  int threads = static_cast<int>(block.x * block.y * block.z);
  if (threads < 1 || threads > 1024) refuse("a block of %d threads: 1 to 1024 are possible", threads);
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u || !grid.x || !grid.y || !grid.z)
    refuse("a grid of %u x %u x %u blocks is not possible", grid.x, grid.y, grid.z);
  if (dynamic_bytes > 227 * 1024) refuse("%zu bytes of shared memory: 232,448 are possible", dynamic_bytes);
  if (machine.fibers.size() < static_cast<std::size_t>(threads)) machine.fibers.resize(threads);
  machine.grid = grid, machine.block = block, machine.dynamic_bytes = dynamic_bytes;
  machine.body = std::move(body);
  int64_t total = static_cast<int64_t>(grid.x) * grid.y * grid.z, last = std::min(total - 1, machine.last_block);
  std::vector<int64_t> order;
  for (int64_t n = std::min(machine.first_block, total - 1); n <= last; n++) order.push_back(n);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (int64_t n : order) {
    machine.at = {static_cast<unsigned>(n % grid.x), static_cast<unsigned>(n / grid.x % grid.y),
                  static_cast<unsigned>(n / grid.x / grid.y)};
    Block(threads).run();
  }
  machine.shared.clear();
}

template <class T>
T* shared(const void* site, std::size_t count) {
  Memory& memory = machine.shared[site];
  if (!memory.bytes) {
    const std::size_t size = count * sizeof(T);
    uint32_t end = 1024;  // what comes before is the system's
    for (const auto& [_, other] : machine.shared) end = std::max<uint32_t>(end, other.address + other.size);
    memory = {std::unique_ptr<unsigned char[]>(new unsigned char[size]), size, (end + 15) / 16 * 16 + 16};
    std::memset(memory.bytes.get(), kPoison, size);
  }
  return reinterpret_cast<T*>(memory.bytes.get());
}

}  // namespace emulator

#undef __global__
#define __global__
#undef __device__
#define __device__
#undef __host__
#define __host__
#undef __forceinline__
#undef __grid_constant__
#undef __launch_bounds__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __restrict__ __restrict

#define dim3 emulator::Extent
#define threadIdx (emulator::machine.now->thread)
#define blockIdx (emulator::machine.at)
#define blockDim (emulator::machine.block)
#define gridDim (emulator::machine.grid)

// One memory a place of the source and a block, as a static __shared__ has.
#define SHARED(T, name, count) \
  static char place_of_##name; \
  T* name = emulator::shared<T>(&place_of_##name, count)
#define SHARED_ALIGNED SHARED  // new[] aligns to 16 bytes
#define DYNAMIC_SHARED(T, name) \
  T* name = emulator::shared<T>(&emulator::machine.dynamic_bytes, emulator::machine.dynamic_bytes / sizeof(T))
#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  ((void)(stream), emulator::launch((grid), (block), (shared), [=] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { emulator::barrier(); }
inline void __syncwarp(unsigned = ~0u) { emulator::publish(0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  emulator::publish(value);
  return emulator::of_lane<T>(lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  emulator::publish(value);
  return emulator::of_lane<T>(emulator::machine.now->number % emulator::kLanes ^ mask);
}
template <class T>
T __shfl_up_sync(unsigned, T value, int distance) {
  int lane = emulator::machine.now->number % emulator::kLanes;
  emulator::publish(value);
  return emulator::of_lane<T>(lane < distance ? lane : lane - distance);
}
template <class T>
T __shfl_down_sync(unsigned, T value, int distance) {
  int lane = emulator::machine.now->number % emulator::kLanes;
  emulator::publish(value);
  return emulator::of_lane<T>(lane + distance >= emulator::kLanes ? lane : lane + distance);
}
inline unsigned __ballot_sync(unsigned, int predicate) {
  emulator::publish(predicate != 0);
  unsigned bits = 0;
  int lanes = emulator::lanes_of(emulator::machine.now->number / emulator::kLanes);
  for (int lane = 0; lane < lanes; lane++) bits |= static_cast<unsigned>(emulator::of_lane<bool>(lane)) << lane;
  return bits;
}
template <class T>
T atomicAdd(T* at, T value) {  // integers only in this project: sums of floats would depend on the order
  static_assert(std::is_integral_v<T>, "a sum whose order is random is refused");
  T old = *at;
  *at = old + value;
  return old;
}
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
// One rounding each; the build forbids the compiler to fuse them (-ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }

// The next launches: their schedule, and which blocks of a grid run.
extern "C" __attribute__((visibility("default"), weak)) void cuda_ext_emulate(
    uint32_t seed, int64_t first_block, int64_t last_block) {
  emulator::machine.random.seed(seed);
  emulator::machine.first_block = first_block;
  emulator::machine.last_block = last_block;
}
