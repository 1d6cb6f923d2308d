// Reads the arguments of a handler's call: attributes by name, operands and results in order. Every
// buffer's type and shape is checked against all others.
#ifndef LPLB_XLA_FFI_FRAME_H_
#define LPLB_XLA_FFI_FRAME_H_

#include <cstdint>
#include <initializer_list>
#include <limits>
#include <optional>
#include <string>

#include "cuda/problem.h"
#include "xla/ffi/api/ffi.h"

namespace lplb {

namespace ffi = ::xla::ffi;

constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();

inline ffi::Error Invalid(const std::string& message) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "lplb_jax: " + message);
}

// Returns from the function with the error of `expression`, if it has one.
#define LPLB_RETURN_IF_ERROR(expression)                           \
  if (::xla::ffi::Error error_ = (expression); error_.failure()) { \
    return error_;                                                 \
  }                                                                \
  static_assert(true, "")

// A dimension that buffers share. Unless it is known, the first buffer with it defines it.
struct Size {
  static constexpr int64_t kUnknown = -1;
  // Leaves room for the extra places that some arrays have beside the experts.
  static constexpr int64_t kMost = kInt32Max - 8;

  const char* name;
  int64_t value = kUnknown;

  int32_t narrow() const { return static_cast<int32_t>(value); }
};

// After the first error, all further reads do nothing and give zeros and null pointers. So a call
// is read from top to bottom, and Finish is checked once, before anything is computed.
class Frame {
 public:
  using Shape = std::initializer_list<Size*>;
  using Types = std::initializer_list<ffi::DataType>;
  using Dimensions = ffi::AnyBuffer::Dimensions;

  Frame(ffi::RemainingArgs operands, ffi::RemainingRets results, ffi::Dictionary attributes)
      : operands_(operands), results_(results), attributes_(attributes) {}

  void Fail(const std::string& message) {
    if (error_.success()) error_ = Invalid(message);
  }
  bool failed() const { return error_.failure(); }

  // An attribute in [low, high].
  int64_t Attribute(const char* name, int64_t low, int64_t high) {
    ++n_attributes_;
    const auto value = attributes_.get<int64_t>(name);
    if (value.has_error()) {
      Fail(std::string(name) + ": expected an int64 attribute, got none");
    } else if (*value < low || *value > high) {
      Fail(std::string(name) + ": expected " + std::to_string(low) + " to " + std::to_string(high) +
           ", got " + std::to_string(*value));
    }
    return failed() ? 0 : *value;
  }
  bool Flag(const char* name) { return Attribute(name, 0, 1) != 0; }

  // The next operand or result. It must have one of `types`, and that type is returned. `shape` is
  // the shape of one batch element: all buffers have the same batch dimensions, any number of them,
  // in front.
  template <typename T>
  ffi::DataType Operand(const char* name, Types types, Shape shape, const T** data) {
    return Read(name, types, shape, operands_.get<ffi::AnyBuffer>(n_operands_++), data);
  }
  template <typename T>
  ffi::DataType Result(const char* name, Types types, Shape shape, T** data) {
    return Read(name, types, shape, results_.get<ffi::AnyBuffer>(n_results_++), data);
  }
  template <typename T>
  void Operand(const char* name, Shape shape, const T** data) {
    Operand(name, {TypeOf(T())}, shape, data);
  }
  template <typename T>
  void Result(const char* name, Shape shape, T** data) {
    Result(name, {TypeOf(T())}, shape, data);
  }

  // For calls that take no batch dimensions; `name` is the first buffer.
  void NoBatch(const char* name) {
    if (batch_rank_ > 0) Fail(std::string(name) + ": expected no batch dimensions");
  }

  // Number of batch elements, few enough for a grid of clusters. Call it after the first buffer.
  int64_t batch() {
    if (batch_ > kInt32Max / 16) {
      Fail("batch: expected at most " + std::to_string(kInt32Max / 16) + " elements, got " +
           std::to_string(batch_));
    }
    return failed() ? 0 : batch_;
  }

  // The first error, or an error if the call has more than was read.
  ffi::Error Finish() {
    CheckCount("operands", n_operands_, operands_.size());
    CheckCount("results", n_results_, results_.size());
    CheckCount("attributes", n_attributes_, attributes_.size());
    return error_;
  }

 private:
  static constexpr ffi::DataType TypeOf(int32_t) { return ffi::DataType::S32; }
  static constexpr ffi::DataType TypeOf(float) { return ffi::DataType::F32; }

  static const ffi::AnyBuffer& BufferOf(const ffi::AnyBuffer& operand) { return operand; }
  static ffi::AnyBuffer BufferOf(ffi::Result<ffi::AnyBuffer> result) { return *result; }

  template <typename Buffer, typename Pointer>
  ffi::DataType Read(const char* name, Types types, Shape shape, const ffi::ErrorOr<Buffer>& found,
                     Pointer* data) {
    *data = nullptr;
    if (found.has_error()) {
      Fail(std::string(name) + ": expected a buffer, got none");
      return ffi::DataType::INVALID;
    }
    const ffi::AnyBuffer buffer = BufferOf(*found);
    const ffi::DataType type = buffer.element_type();
    bool known = false;
    for (const ffi::DataType allowed : types) known |= type == allowed;
    if (!known) {
      Fail(std::string(name) + ": expected " + NamesOf(types) + ", got " + NameOf(type));
    } else {
      CheckShape(name, buffer.dimensions(), shape);
    }
    if (failed()) return ffi::DataType::INVALID;
    *data = static_cast<Pointer>(buffer.untyped_data());
    return type;
  }

  void CheckShape(const char* name, Dimensions dims, Shape shape) {
    for (const int64_t size : dims) {
      if (size > Size::kMost) {
        return Fail(std::string(name) + ": expected sizes of at most " +
                    std::to_string(Size::kMost) + ", got " + Got(dims));
      }
    }
    if (dims.size() < shape.size() || !FitsBatch(dims, dims.size() - shape.size()) ||
        !FitsShape(dims, shape)) {
      Fail(std::string(name) + ": expected " + Expected(shape) + ", got " + Got(dims));
    }
  }

  bool FitsBatch(Dimensions dims, size_t rank) {
    if (batch_dims_) {
      if (batch_rank_ != rank) return false;
      for (size_t i = 0; i < rank; ++i) {
        if (dims[i] != (*batch_dims_)[i]) return false;
      }
      return true;
    }
    for (size_t i = 0; i < rank; ++i) {
      if (__builtin_mul_overflow(batch_, dims[i], &batch_)) return false;
    }
    batch_dims_ = dims;
    batch_rank_ = rank;
    return true;
  }

  static bool FitsShape(Dimensions dims, Shape shape) {
    size_t i = dims.size() - shape.size();
    for (Size* size : shape) {
      if (size->value == Size::kUnknown) size->value = dims[i];
      if (size->value != dims[i++]) return false;
    }
    return true;
  }

  static std::string NameOf(ffi::DataType type) {
    switch (type) {
      case ffi::DataType::S32:
        return "int32";
      case ffi::DataType::S64:
        return "int64";
      case ffi::DataType::U8:
        return "uint8";
      case ffi::DataType::U16:
        return "uint16";
      case ffi::DataType::BF16:
        return "bfloat16";
      case ffi::DataType::F16:
        return "float16";
      case ffi::DataType::F32:
        return "float32";
      case ffi::DataType::F64:
        return "float64";
      default:
        return "XLA's type " + std::to_string(static_cast<int>(type));
    }
  }

  static std::string NamesOf(Types types) {
    std::string names;
    for (const ffi::DataType type : types) names += (names.empty() ? "" : " or ") + NameOf(type);
    return names;
  }

  std::string Expected(Shape shape) const {
    std::string text = "[";
    for (size_t i = 0; i < batch_rank_; ++i) text += std::to_string((*batch_dims_)[i]) + ", ";
    for (const Size* size : shape) {
      text += size->name;
      if (size->value != Size::kUnknown) text += " = " + std::to_string(size->value);
      text += ", ";
    }
    return Closed(std::move(text));
  }

  static std::string Got(Dimensions dims) {
    std::string text = "[";
    for (const int64_t size : dims) text += std::to_string(size) + ", ";
    return Closed(std::move(text));
  }

  static std::string Closed(std::string text) {
    if (text.size() > 1) text.resize(text.size() - 2);
    return text + "]";
  }

  void CheckCount(const char* what, size_t read, size_t given) {
    if (read == given) return;
    Fail(std::string(what) + ": expected " + std::to_string(read) + ", got " +
         std::to_string(given) + "; is this lplb_jax's Python of another version?");
  }

  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  ffi::Dictionary attributes_;
  size_t n_operands_ = 0;
  size_t n_results_ = 0;
  size_t n_attributes_ = 0;
  std::optional<Dimensions> batch_dims_;
  size_t batch_rank_ = 0;
  int64_t batch_ = 1;
  ffi::Error error_;
};

}  // namespace lplb

#endif  // LPLB_XLA_FFI_FRAME_H_
