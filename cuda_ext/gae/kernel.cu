// Generalised advantage estimation, a block a row: A_t = delta_t + decay A_next with delta_t = r_t + gamma V_next - V_t,
// "next" being the next position that counts.
//
// A block goes through a row from its end, a tile at a time, N positions a thread, thread 0 at the end. First everyone
// learns the value of the next position that counts; then a stretch of positions is a line A -> a A + b, and lines
// compose in any grouping: a scan over lanes, then one over warps. Two barriers a tile. Behind a sequence's end value and
// advantage are 0, and no line goes on over it (0 times infinity would). Where nothing counts, nothing is used of what
// stands there. How a row is summed depends on its length alone.
// sass gae_rows<4>: LDG.E.128 STG.E.128 SHFL.UP
#include "device/device.cuh"

constexpr int kMostThreads = 512;

// Two blocks a multiprocessor: for more, the compiler would save registers by spilling one.
template <int N>
__global__ void __launch_bounds__(kMostThreads, 2)
    gae_rows(const float* rewards, const float* values, const uint8_t* mask, const uint8_t* ends,
             const float* bootstrap, float gamma, float decay, int64_t length, float* advantages, float* returns) {
  SHARED(bool, any_of, kWarp);  // per warp: whether a position counts, the value of the first that does, its line
  SHARED(float, value_of, kWarp);
  SHARED(float, a_of, kWarp);
  SHARED(float, b_of, kWarp);
  SHARED(bool, cut_of, kWarp);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
  const int64_t row = blockIdx.x, start = row * length;
  float next_value = bootstrap ? bootstrap[row] : 0.0f, next_advantage = 0.0f;  // behind the tile

  for (int64_t done = 0; done < length; done += int64_t{N} * blockDim.x) {
    const int64_t place = length - done - int64_t{N} * (threadIdx.x + 1);
    Pack<float, N> reward = {}, value = {};
    Pack<uint8_t, N> counts = {}, end = {};
    if (place >= 0) {
      reward = load<float, N>(rewards + start + place);
      value = load<float, N>(values + start + place);
      counts = load<uint8_t, N>(mask + start + place);
      if (ends) end = load<uint8_t, N>(ends + start + place);
    }

    bool any = false;
    float first = 0.0f;
    for (int n = N - 1; n >= 0; n--) {
      if (end.at[n]) any = true, first = 0.0f;
      if (counts.at[n]) any = true, first = value.at[n];
    }
    const unsigned lanes = __ballot_sync(~0u, any), behind = lanes & ((1u << lane) - 1);
    const float of_lane = __shfl_sync(~0u, first, behind ? 31 - __clz(behind) : 0);
    if (lane == (lanes ? 31 - __clz(lanes) : 0)) any_of[warp] = any, value_of[warp] = first;
    __syncthreads();
    float known = next_value;
    for (int other = 0; other < warps; other++) {
      if (other == warp) known = behind ? of_lane : next_value;
      if (any_of[other]) next_value = value_of[other];
    }

    bool cut = false;  // its line begins behind an end
    float a = 1.0f, b = 0.0f, delta[N];
    for (int n = N - 1; n >= 0; n--) {
      delta[n] = 0.0f;
      if (end.at[n]) cut = true, known = b = 0.0f;
      if (!counts.at[n]) continue;
      delta[n] = reward.at[n] + gamma * known - value.at[n];
      known = value.at[n];
      b = delta[n] + decay * b;
      a *= decay;
    }
    const unsigned cuts = __ballot_sync(~0u, cut);
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const float a_behind = __shfl_up_sync(~0u, a, distance), b_behind = __shfl_up_sync(~0u, b, distance);
      if (lane < distance) continue;
      const unsigned mine = ((1u << distance) - 1) << (lane - distance + 1);  // lanes that a line spans so far
      if (cuts & mine) continue;
      b += a * b_behind;
      a *= a_behind;
    }
    if (lane == kWarp - 1) a_of[warp] = a, b_of[warp] = b, cut_of[warp] = cuts;
    const float a_behind = __shfl_up_sync(~0u, a, 1), b_behind = __shfl_up_sync(~0u, b, 1);
    __syncthreads();
    float advantage = 0.0f;
    for (int other = 0; other < warps; other++) {
      if (other == warp) {
        advantage = lane ? b_behind : next_advantage;
        if (lane && !(cuts & ((1u << lane) - 1))) advantage += a_behind * next_advantage;
      }
      next_advantage = cut_of[other] ? b_of[other] : a_of[other] * next_advantage + b_of[other];
    }

    if (place < 0) continue;
    for (int n = N - 1; n >= 0; n--) {
      if (end.at[n]) advantage = 0.0f;
      if (counts.at[n]) advantage = delta[n] + decay * advantage;
      reward.at[n] = counts.at[n] ? advantage : 0.0f;
      value.at[n] = counts.at[n] ? advantage + value.at[n] : 0.0f;
    }
    store(advantages + start + place, reward);
    store(returns + start + place, value);
  }
}

void gae_forward(Stream stream, Tensor rewards, Tensor values, Tensor mask, Optional ends, Optional bootstrap,
                 double gamma, double lam, Tensor advantages, Tensor returns) {
  if (rewards.dim != 2) refuse("rewards %s is not [B,T]", shape_of(rewards).c_str());
  const int64_t rows = rewards.size(0), length = rewards.size(1);
  check("rewards", rewards, kFloat, rows * length);
  check_like("values", values, "rewards", rewards);
  check_like("advantages", advantages, "rewards", rewards);
  check_like("returns", returns, "rewards", rewards);
  const auto check_places = [&](const char* name, const Tensor& places) {
    if (places.dim != 2 || places.size(0) != rows || places.size(1) != length)
      refuse("%s %s is not of the shape of rewards %s", name, shape_of(places).c_str(), shape_of(rewards).c_str());
    check(name, places, kBool, rows * length);
  };
  check_places("mask", mask);
  if (ends.given()) check_places("ends", ends);
  if (bootstrap.given()) check("bootstrap_values", bootstrap, kFloat, rows);
  if (rows == 0 || length == 0) return;

  auto go = [&](auto n) {
    constexpr int N = decltype(n)::value;
    const auto kernel = gae_rows<N>;
    const int64_t warps = (length + kWarp * N - 1) / (kWarp * N), most = kMostThreads / kWarp;
    LAUNCH(kernel, blocks_of(rows, 1), static_cast<unsigned>(kWarp * (warps < most ? warps : most)), 0, stream,
           rewards.as<float>(), values.as<float>(), mask.as<uint8_t>(), ends.given() ? ends.as<uint8_t>() : nullptr,
           bootstrap.given() ? bootstrap.as<float>() : nullptr, static_cast<float>(gamma),
           static_cast<float>(gamma * lam), length, advantages.as<float>(), returns.as<float>());
  };
  bool packs = length % 4 == 0;
  for (const Tensor& tensor : {rewards, values, mask, advantages, returns}) packs = packs && aligned(tensor.data);
  if (ends.given()) packs = packs && aligned(ends.data);
  if (packs) return go(std::integral_constant<int, 4>{});
  go(std::integral_constant<int, 1>{});
}

OP(gae_forward,
   "gae_forward(Tensor rewards, Tensor values, Tensor mask, Tensor? ends, Tensor? bootstrap_values, float gamma, float lam, "
   "Tensor(a!) advantages, Tensor(b!) returns) -> ()")
