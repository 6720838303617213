// How a host program hands tensors to kernels: plain C records, no torch. A kernel's file ends with
//
//     OP(rms_norm_forward, "rms_norm_forward(Tensor x, Tensor weight, float eps, Tensor(a!) y) -> ()")
//
// for a function `void rms_norm_forward(Stream, Tensor x, Tensor weight, double eps, Tensor y)`. The binding, or any
// other caller, finds all of them by `cuda_ext_op(n)`. A function that cannot do what it is asked throws Refused with
// the values; across the C boundary that is a message, and no message means that the work is on the stream.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

using Stream = void*;

enum DType : int32_t { kFloat, kBFloat16, kHalf, kDouble, kInt64, kInt32, kBool, kOther };

inline const char* name_of(int32_t dtype) {
  const char* names[] = {"float32", "bfloat16", "float16", "float64", "int64", "int32", "bool", "another dtype"};
  return names[dtype < 0 || dtype > kOther ? kOther : dtype];
}

struct Tensor {  // strides in elements
  void* data;
  int32_t dtype, dim;
  const int64_t* sizes;
  const int64_t* strides;

  bool given() const { return dtype >= 0; }  // an optional tensor that is None has dtype -1
  int64_t size(int at) const { return sizes[at < 0 ? at + dim : at]; }
  int64_t numel() const {
    int64_t product = 1;
    for (int at = 0; at < dim; at++) product *= sizes[at];
    return product;
  }
  template <class T>
  T* as() const { return static_cast<T*>(data); }
};

struct Tensors {
  const Tensor* at;
  int64_t length;
};

struct Value {  // one of these, as the op's `kinds` says
  Tensor tensor;
  Tensors tensors;
  double number;
  int64_t integer;
};

struct Refused {
  std::string why;
};

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void refuse(const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  throw Refused{text};
}

inline std::string shape_of(const Tensor& tensor) {
  std::string text = "[";
  for (int at = 0; at < tensor.dim; at++) text += (at ? "," : "") + std::to_string(tensor.sizes[at]);
  return text + "]";
}

// Refuses what is not one block of memory in order.
inline void check_contiguous(const char* name, const Tensor& tensor) {
  int64_t expected = 1;
  for (int at = tensor.dim - 1; at >= 0; at--) {
    if (tensor.sizes[at] != 1 && tensor.strides[at] != expected && tensor.numel() > 0)
      refuse("%s %s has stride %lld in dimension %d, not %lld: it must be contiguous", name, shape_of(tensor).c_str(),
             (long long)tensor.strides[at], at, (long long)expected);
    expected *= tensor.sizes[at];
  }
}

// Refuses what is not of this dtype, contiguous, of so many elements.
inline void check(const char* name, const Tensor& tensor, int32_t dtype, int64_t numel) {
  if (tensor.dtype != dtype) refuse("%s is %s, not %s", name, name_of(tensor.dtype), name_of(dtype));
  if (tensor.numel() != numel)
    refuse("%s %s has %lld elements, not %lld", name, shape_of(tensor).c_str(), (long long)tensor.numel(),
           (long long)numel);
  check_contiguous(name, tensor);
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.dim == b.dim && std::equal(a.sizes, a.sizes + a.dim, b.sizes);
}

// Refuses what has not the dtype and the sizes of `other`, or is not contiguous.
inline void check_like(const char* name, const Tensor& tensor, const char* name_of_other, const Tensor& other) {
  if (!same_sizes(tensor, other) || tensor.dtype != other.dtype)
    refuse("%s is %s %s beside %s of %s %s: both must be alike", name, name_of(tensor.dtype), shape_of(tensor).c_str(),
           name_of_other, name_of(other.dtype), shape_of(other).c_str());
  check_contiguous(name, tensor);
}

// Refuses what no kernel computes with.
inline void check_float(const char* name, const Tensor& tensor) {
  if (tensor.dtype > kHalf) refuse("%s is %s, not float32, bfloat16 or float16", name, name_of(tensor.dtype));
}

struct Op {
  const char* name;
  const char* schema;
  std::string kinds;  // a letter an argument: t tensor, ? optional tensor, l tensors, d number, i integer
  void (*call)(const Value* values, Stream stream);
};

inline std::vector<Op>& ops() {
  static std::vector<Op> all;
  return all;
}

struct Optional : Tensor {};  // a Tensor that need not be given

constexpr Tensor kNone{nullptr, -1, 0, nullptr, nullptr};

template <class T>
struct Take;
template <>
struct Take<Tensor> {
  static constexpr char kind = 't';
  static Tensor from(const Value& value) { return value.tensor; }
};
template <>
struct Take<Optional> {
  static constexpr char kind = '?';
  static Optional from(const Value& value) { return {value.tensor}; }
};
template <>
struct Take<Tensors> {
  static constexpr char kind = 'l';
  static Tensors from(const Value& value) { return value.tensors; }
};
template <>
struct Take<double> {
  static constexpr char kind = 'd';
  static double from(const Value& value) { return value.number; }
};
template <>
struct Take<int64_t> {
  static constexpr char kind = 'i';
  static int64_t from(const Value& value) { return value.integer; }
};

template <auto function>
struct Entry;
template <class... A, void (*function)(Stream, A...)>
struct Entry<function> {
  Entry(const char* name, const char* schema) { ops().push_back({name, schema, {Take<A>::kind...}, call}); }

  static void call(const Value* values, Stream stream) { spread(values, stream, std::index_sequence_for<A...>{}); }

  template <std::size_t... at>
  static void spread(const Value* values, Stream stream, std::index_sequence<at...>) {
    function(stream, Take<A>::from(values[at])...);
  }
};

#define OP(function, schema) static const Entry<function> entry_of_##function(#function, schema);
