// The one binding: every op that stands in the library (device/interface.h) becomes an operator of torch, on CUDA
// tensors, or with -DEMULATOR on those of a CPU. It speaks torch's stable ABI only, so that a library built beside one
// torch loads in later ones. Outputs are arguments that are written, so nothing is allocated here; checks of sizes and
// dtypes are the op's own. Here: one device for all tensors, its guard, its current stream.
#include <dlfcn.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <deque>
#include <optional>
#include <utility>

#include "device/interface.h"

namespace {

using Handle = torch::stable::Tensor;

#ifdef EMULATOR
constexpr const char *kSpace = "cuda_ext_emulator", *kKey = "CPU";
#else
constexpr const char *kSpace = "cuda_ext_cuda", *kKey = "CUDA";
#endif

int32_t dtype_of(const Handle& tensor) {
  int32_t dtype = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  if (dtype == aoti_torch_dtype_float32()) return kFloat;
  if (dtype == aoti_torch_dtype_bfloat16()) return kBFloat16;
  if (dtype == aoti_torch_dtype_float16()) return kHalf;
  if (dtype == aoti_torch_dtype_float64()) return kDouble;
  if (dtype == aoti_torch_dtype_int64()) return kInt64;
  if (dtype == aoti_torch_dtype_int32()) return kInt32;
  return dtype == aoti_torch_dtype_bool() ? kBool : kOther;
}

// The arguments of one call; owns what torch handed over.
struct Call {
  std::deque<Handle> handles;
  std::deque<std::vector<Tensor>> lists;
  std::vector<Value> values;
  int32_t device = -1;

  Tensor take(Handle handle) {
    handles.push_back(std::move(handle));
    const Handle& kept = handles.back();
    if (kept.is_cuda()) place(kept.get_device_index());
    return {kept.data_ptr(), dtype_of(kept), static_cast<int32_t>(kept.dim()), kept.sizes().data(),
            kept.strides().data()};
  }

  void place(int32_t index) {
    if (device >= 0 && device != index) refuse("tensors are on cuda:%d and cuda:%d: one device is needed", device, index);
    device = index;
  }

  void read(char kind, StableIValue item) {
    using torch::stable::detail::to;
    Value value{};
    value.tensor.dtype = -1;
    if (kind == 't') value.tensor = take(to<Handle>(item));
    if (kind == 'd') value.number = to<double>(item);
    if (kind == 'i') value.integer = to<int64_t>(item);
    if (kind == '?') {
      auto given = to<std::optional<Handle>>(item);
      if (given) value.tensor = take(std::move(*given));
    }
    if (kind == 'l') {
      std::vector<Tensor>& list = lists.emplace_back();
      for (Handle& handle : to<std::vector<Handle>>(item)) list.push_back(take(std::move(handle)));
      value.tensors = {list.data(), static_cast<int64_t>(list.size())};
    }
    values.push_back(value);
  }
};

// A library without libtorch_cuda among its needs finds the loaded one, if there is one.
Stream current_stream(int32_t device) {
  if (device < 0) return nullptr;
  using Get = AOTITorchError (*)(int32_t, void**);
  static Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_NOW);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Get>(symbol);
  }();
  void* stream = nullptr;
  if (!get || get(device, &stream) != 0) refuse("this torch does not tell the current CUDA stream");
  return stream;
}

void run(const Op& op, StableIValue* stack) {
  Call call;
  for (std::size_t at = 0; at < op.kinds.size(); at++) call.read(op.kinds[at], stack[at]);
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (call.device >= 0) guard.emplace(call.device);
  op.call(call.values.data(), current_stream(call.device));
}

// Torch wants a function without state for each op: one a place in the table.
template <std::size_t at>
void boxed(StableIValue* stack, uint64_t, uint64_t) {
  const Op& op = ops()[at];
  try {
    run(op, stack);
  } catch (const Refused& refused) {
    throw std::runtime_error(std::string(op.name) + ": " + refused.why);
  }
}

constexpr std::size_t kMost = 64;

template <std::size_t... at>
std::vector<void (*)(StableIValue*, uint64_t, uint64_t)> all_boxed(std::index_sequence<at...>) {
  return {boxed<at>...};
}

}  // namespace

#ifndef EMULATOR
extern "C" int cudaDriverGetVersion(int*);
extern "C" int cudaRuntimeGetVersion(int*);
extern "C" int cudaDeviceGetAttribute(int*, int, int);

// What the machine can run, before anything is registered: versions as 1000 major + 10 minor, 0 without a driver.
extern "C" __attribute__((visibility("default"))) void cuda_ext_versions(int* driver, int* runtime) {
  *driver = *runtime = 0;
  cudaDriverGetVersion(driver);
  cudaRuntimeGetVersion(runtime);
}

// A card's compute capability as 10 major + minor, 0 if there is no such card.
extern "C" __attribute__((visibility("default"))) int cuda_ext_capability(int device) {
  constexpr int kMajor = 75, kMinor = 76;  // cudaDevAttrComputeCapability*
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, kMajor, device) || cudaDeviceGetAttribute(&minor, kMinor, device)) return 0;
  return 10 * major + minor;
}
#endif

// Called after the library is loaded, when every op has entered itself.
extern "C" __attribute__((visibility("default"))) int cuda_ext_register() {
  using torch::stable::detail::StableLibrary;
  static StableLibrary definitions(StableLibrary::Kind::DEF, kSpace, nullptr, __FILE__, __LINE__);
  static StableLibrary kernels(StableLibrary::Kind::IMPL, kSpace, kKey, __FILE__, __LINE__);
  const auto functions = all_boxed(std::make_index_sequence<kMost>{});
  if (ops().size() > kMost) return -1;
  for (std::size_t at = 0; at < ops().size(); at++) {
    definitions.def(ops()[at].schema);
    kernels.impl(ops()[at].name, functions[at]);
  }
  return static_cast<int>(ops().size());
}
