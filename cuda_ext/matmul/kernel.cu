// The ladder: each rung computes the same product and moves less than the one below (README.md counts it).
// sass matmul_tiles<.*>: LDS STS FFMA
// sass matmul_registers<.*>: LDS.128 FFMA
// sass matmul_tensor<.*>: HMMA.16816.F32 LDG.E.128
// sass matmul_wgmma<.*> on sm_90a: HGMMA.64x128x16.F32 UTMALDG.2D SYNCS
// sass matmul_specialised<.*> on sm_90a: HGMMA.64x256x16.F32 UTMALDG.2D SYNCS USETMAXREG
#include "matmul/registers.cuh"
#include "matmul/tensor_cores.cuh"
#include "matmul/wgmma.cuh"

dim3 tiles_of(Sizes size, int rows, int columns) {
  const int64_t x = (size.m + rows - 1) / rows, y = (size.n + columns - 1) / columns;
  if (x > 2147483647 || y > 65535) refuse("c [%lld,%lld] has too many tiles", (long long)size.m, (long long)size.n);
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), 1);
}

template <class T>
void launch_rung(Stream stream, int64_t rung, const T* a, const T* b, T* c, Sizes size) {
  const auto blocks = [&](int rows, int columns) { return tiles_of(size, rows, columns); };
  const auto ahead = matmul_registers<T, true>, plain = matmul_registers<T, false>;
  if (rung == 0) LAUNCH(matmul_naive<T>, blocks(16, 16), 256, 0, stream, a, b, c, size);
  if (rung == 1) LAUNCH(matmul_coalesced<T>, blocks(8, 32), 256, 0, stream, a, b, c, size);
  if (rung == 2) LAUNCH(matmul_tiles<T>, blocks(32, 32), 1024, 0, stream, a, b, c, size);
  if (rung == 3) LAUNCH(plain, blocks(128, 128), 256, 0, stream, a, b, c, size);
  if (rung == 4) LAUNCH(ahead, blocks(128, 128), 256, 0, stream, a, b, c, size);
  if constexpr (sizeof(T) == 2)
    if (rung == 5) LAUNCH(matmul_tensor<T>, blocks(128, 128), 256, 0, stream, a, b, c, size);
}

// Rungs 6 and 7, of two-byte numbers.
template <class T>
void launch_on_hopper(Stream stream, int64_t rung, const T* a, const T* b, T* c, Sizes size) {
  check_hopper(rung == 6 ? "wgmma" : "specialised", hopper::capability());
  if (size.k == 0) return launch_rung(stream, 0, a, b, c, size);  // zeros: there is nothing to bring
  const auto of_a = ring::map_of("a", a, size.m, size.k, 128), of_b = ring::map_of("b", b, size.k, size.n, ring::kDeep);
  if (!aligned(c)) refuse("c begins at %p, not at a multiple of 16", (void*)c);
  if (rung == 6) {
    const dim3 blocks = tiles_of(size, wgmma::kSide, wgmma::kSide);
    LAUNCH(matmul_wgmma<T>, blocks, 256, wgmma::kShared, stream, of_a, of_b, c, size);
  } else {
    const auto tiles = specialised::Tiles(size).count();
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(tiles, hopper::multiprocessors()));
    LAUNCH(matmul_specialised<T>, blocks, specialised::kThreads, specialised::kShared, stream, of_a, of_b, c, size);
  }
}

void matmul(Stream stream, int64_t rung, Tensor a, Tensor b, Tensor c) {
  check_float("a", a);
  if (a.dim != 2 || b.dim != 2 || a.size(1) != b.size(0))
    refuse("a %s and b %s are not [M,K] and [K,N]", shape_of(a).c_str(), shape_of(b).c_str());
  const Sizes size{a.size(0), b.size(1), a.size(1)};
  check_contiguous("a", a);
  check("b", b, a.dtype, size.k * size.n);
  check("c", c, a.dtype, size.m * size.n);
  const int64_t rungs = a.dtype == kFloat ? 5 : 8;
  if (rung < 0 || rung >= rungs)
    refuse("rung %lld is not there: 0 to %lld for %s", (long long)rung, (long long)rungs - 1, name_of(a.dtype));
  if (size.m == 0 || size.n == 0) return;
  of_dtype(a.dtype, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == 2)
      if (rung > 5) return launch_on_hopper(stream, rung, a.as<T>(), b.as<T>(), c.as<T>(), size);
    launch_rung(stream, rung, a.as<T>(), b.as<T>(), c.as<T>(), size);
  });
}

OP(matmul, "matmul(int rung, Tensor a, Tensor b, Tensor(a!) c) -> ()")
