// What matmul/hopper.cuh wraps of a card of compute capability 9.0, in the emulator's words under the same names:
// mbarriers, tile loads by TMA, products by wgmma. A tile's bytes land at a random later moment, tiles in any order; a
// product reads its operands at its issue, at the wait for it or between, by the very descriptors that the instruction
// gets. Left out: fences between proxies, multicast, what the hardware refuses besides, other swizzles, time.
#pragma once

#include "device/device.cuh"

namespace emulator::hopper {

inline unsigned multiprocessors() { return 3; }  // few, so that a block makes several tiles
inline int capability() { return 90; }

inline uint32_t shared_address(const void* pointer) {
  const auto* at = static_cast<const unsigned char*>(pointer);
  for (const auto& [_, memory] : machine.shared)
    if (at >= memory.bytes.get() && at < memory.bytes.get() + memory.size)
      return memory.address + static_cast<uint32_t>(at - memory.bytes.get());
  fail("an address is taken for one in shared memory, and is not");
}

inline const Memory& memory_at(uint32_t address, std::size_t bytes) {
  for (const auto& [_, memory] : machine.shared)
    if (address >= memory.address && address + bytes <= memory.address + memory.size) return memory;
  fail(std::to_string(bytes) + " bytes at " + std::to_string(address) + " are not in one piece of shared memory");
}

inline unsigned char* at_address(uint32_t address, std::size_t bytes) {
  const Memory& memory = memory_at(address, bytes);
  return memory.bytes.get() + (address - memory.address);
}

// Bytes on their way: how soon they may be expected is drawn anew each time.
inline void later(std::function<void()> land) {
  machine.late.push_back(std::move(land));
  machine.pace = 1u << machine.random() % 12;
}

// Its eight bytes in shared memory: a phase ends when `left` arrivals and all expected bytes have come.
struct Mbarrier {
  uint8_t mark, phase;
  uint16_t count, left;
  int16_t sixteens;  // of bytes, less those that came

  void turn() {
    machine.changes++;
    if (left || sixteens) return;
    left = count;
    phase ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == 8);
constexpr uint8_t kMark = 0xBA;

inline Mbarrier& mbarrier(uint32_t address) {
  auto* barrier = reinterpret_cast<Mbarrier*>(at_address(address, 8));
  if (barrier->mark != kMark) fail("an mbarrier is used that this thread does not see initialised");
  return *barrier;
}

inline void mbarrier_init(uint32_t address, unsigned arrivals) {
  if (address % 8) fail("an mbarrier begins at " + std::to_string(address) + ", not at a multiple of 8");
  const auto count = static_cast<uint16_t>(arrivals);
  *reinterpret_cast<Mbarrier*>(at_address(address, 8)) = {kMark, 0, count, count, 0};
}

inline void mbarrier_fence() {}

inline void mbarrier_arrive(uint32_t address, unsigned bytes = 0) {
  Mbarrier& barrier = mbarrier(address);
  if (!barrier.left) fail("an mbarrier gets more arrivals than the " + std::to_string(barrier.count) + " of its phase");
  barrier.sixteens = static_cast<int16_t>(barrier.sixteens + static_cast<int>(bytes / 16));
  barrier.left--;
  barrier.turn();
}

inline void mbarrier_wait(uint32_t address, unsigned parity) {
  wait_until([&] { return mbarrier(address).phase != parity; });
}

// A matrix of rows in global memory, and the box of it that one instruction brings.
struct TensorMap {
  const unsigned char* data;
  int64_t rows, bytes;  // bytes a row
  int box_rows;
};
constexpr int kBoxBytes = 128;  // a box's row, which is what the swizzle spans

template <class T>
TensorMap tensor_map(const T* data, int64_t rows, int64_t columns, int box_rows) {
  return {reinterpret_cast<const unsigned char*>(data), rows, columns * static_cast<int64_t>(sizeof(T)), box_rows};
}

// Within 1,024 bytes, which are 8 rows of 8 times 16: the sixteens of row r stand where r is xored to their number.
inline uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

template <class T>
void tma_load(uint32_t to, const TensorMap& map, uint32_t barrier, int column, int row) {
  if (to % 1024) fail("a swizzled tile begins at " + std::to_string(to) + ", not at a multiple of 1,024");
  const int bytes = map.box_rows * kBoxBytes;
  mbarrier(barrier);
  unsigned char* memory = at_address(to, bytes);
  later([=] {
    for (int at = 0; at < bytes; at += sizeof(T)) {
      const int64_t from_row = row + int64_t{at / kBoxBytes};
      const int64_t from = column * int64_t{sizeof(T)} + at % kBoxBytes;
      unsigned char* here = memory + (swizzled(to + at) - to);
      const bool inside = from_row >= 0 && from_row < map.rows && from >= 0 && from < map.bytes;
      if (inside)
        std::memcpy(here, map.data + from_row * map.bytes + from, sizeof(T));
      else
        std::memset(here, 0, sizeof(T));
    }
    Mbarrier& arrived = mbarrier(barrier);
    arrived.sixteens = static_cast<int16_t>(arrived.sixteens - bytes / 16);
    arrived.turn();
  });
}

// An operand of wgmma as its descriptor says: lines of 16 along k, or, transposed, k after k of 64 lines each.
struct Operand {
  uint32_t start, leading, stride;
  bool transposed;

  Operand(uint64_t descriptor, bool transposed)
      : start((descriptor & 0x3FFF) << 4),
        leading((descriptor >> 16 & 0x3FFF) << 4),
        stride((descriptor >> 32 & 0x3FFF) << 4),
        transposed(transposed) {
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7)) fail("a descriptor of wgmma has not a swizzle of 128 bytes");
  }

  template <class T>
  float at(const Memory& memory, uint32_t line, uint32_t k) const {
    const uint32_t plain = transposed ? line / 64 * leading + k / 8 * stride + k % 8 * 128 + line % 64 * 2
                                      : line / 8 * stride + line % 8 * 128 + k * 2;
    const uint32_t place = swizzled(start + plain) - memory.address;
    if (place + 2 > memory.size) fail("wgmma reads beyond its shared memory");
    T value;
    std::memcpy(&value, memory.bytes.get() + place, 2);
    return wide(value);
  }
};

// This lane's share of d[64, N] += a[64, 16] b[16, N]: of eight columns it holds two, in rows lane / 4 and that + 8.
template <class T, int kNumbers>
void multiply(float (&d)[kNumbers], const Operand& a, const Operand& b) {
  const Memory &of_a = memory_at(a.start, 2), &of_b = memory_at(b.start, 2);
  const int number = machine.now->number, lane = number % 32, top = number / 32 % 4 * 16 + lane / 4;
  float left[2][16];
  for (int k = 0; k < 16; k++)
    for (int half : {0, 1}) left[half][k] = a.at<T>(of_a, top + half * 8, k);
  for (int n = 0; n < kNumbers; n += 4)
    for (int odd : {0, 1})
      for (int k = 0; k < 16; k++) {
        const float right = b.at<T>(of_b, n * 2 + lane % 4 * 2 + odd, k);
        for (int half : {0, 1}) d[n + half * 2 + odd] += left[half][k] * right;
      }
}

inline void wgmma_fence() { publish(0); }
inline void wgmma_commit() { machine.now->deferred.push_back(nullptr); }

// a: rows along k; b: transposed.
template <class T, int kNumbers>
void wgmma(float (&d)[kNumbers], uint64_t a, uint64_t b) {
  const Pack<uint64_t, 2> mine{{a, b}};
  publish(mine);
  const auto first = of_lane<Pack<uint64_t, 2>>(0);
  if (first.at[0] != a || first.at[1] != b) fail("the lanes of a warp give wgmma different descriptors");
  auto& deferred = machine.now->deferred;
  deferred.push_back([&d, left = Operand(a, false), right = Operand(b, true)] { multiply<T>(d, left, right); });
  if (machine.random() % 2) return;
  for (auto& work : deferred)
    if (work) std::exchange(work, [] {})();
}

// Until at most `pending` of this warp's groups are unfinished.
template <int pending>
void wgmma_wait() {
  auto& deferred = machine.now->deferred;
  while (std::count(deferred.begin(), deferred.end(), nullptr) > pending) {
    const auto work = std::move(deferred.front());
    deferred.pop_front();
    if (work) work();
  }
  publish(0);
}
template <int kNumbers>
void wgmma_wait_all(float (&)[kNumbers]) { wgmma_wait<0>(); }

template <int registers>
void take_registers() {}
template <int registers>
void give_registers() {}

}  // namespace emulator::hopper
