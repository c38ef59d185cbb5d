// A tensor borrowed from torch through the DLPack C exchange API, and the checks on it.
//
// A tensor type offers the API as a capsule in its attribute `__dlpack_c_exchange_api__`; the structs below are the
// parts of that C interface (DLPack 1.x) this module uses. Nothing is copied or owned: a Tensor is valid for the call
// it came with.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <string>

#include "numeric.h"

namespace flowgrpo_fast {
namespace dlpack {

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBfloat = 4 };

struct Device {
  int32_t type, id;
};

struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};

struct TensorView {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* allocate;
  void* managed_from_object;
  void* managed_to_object;
  int (*view_of_object)(void* object, TensorView* out);
  int (*current_work_stream)(int32_t device_type, int32_t device_id, void** out);
};

// The API of an object's type, or null if it is no tensor. The last type is remembered: in practice there is one.
inline const ExchangeApi* api_of(PyObject* object) {
  static PyTypeObject* last_type = nullptr;
  static const ExchangeApi* last_api = nullptr;
  PyTypeObject* type = Py_TYPE(object);
  if (type == last_type) return last_api;
  PyObject* capsule = PyObject_GetAttrString(reinterpret_cast<PyObject*>(type), "__dlpack_c_exchange_api__");
  void* pointer = capsule ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr;
  Py_XDECREF(capsule);
  if (PyErr_Occurred()) PyErr_Clear();
  auto api = static_cast<const ExchangeApi*>(pointer);
  while (api && api->major > 1) api = api->previous;
  if (!api || !api->view_of_object) return nullptr;
  Py_INCREF(type);
  last_type = type;
  return last_api = api;
}

}  // namespace dlpack

// What a Python argument turned out to be: a tensor, None, or something else (which a check will name).
class Tensor {
 public:
  Tensor() = default;
  explicit Tensor(PyObject* object) : object_(object) {
    api_ = object == Py_None ? nullptr : dlpack::api_of(object);
    if (api_ && api_->view_of_object(object, &view_) != 0) {
      PyErr_Clear();
      readable_ = false;
    }
  }

  bool is_none() const { return object_ == Py_None; }
  bool is_tensor() const { return api_ != nullptr; }
  bool is_readable() const { return readable_; }  // false for meta, sparse and the like
  bool has_memory() const { return view_.data != nullptr; }
  PyObject* object() const { return object_; }
  int ndim() const { return view_.ndim; }
  int64_t size(int axis) const { return view_.shape[axis]; }
  dlpack::Device device() const { return view_.device; }

  int64_t numel() const {
    int64_t product = 1;
    for (int axis = 0; axis < view_.ndim; ++axis) product *= view_.shape[axis];
    return product;
  }

  bool is_contiguous() const {
    int64_t expected = 1;
    for (int axis = view_.ndim - 1; axis >= 0 && view_.strides; --axis) {
      if (view_.shape[axis] != 1 && view_.strides[axis] != expected) return false;
      expected *= view_.shape[axis];
    }
    return true;
  }

  int64_t itemsize() const { return (view_.dtype.bits * view_.dtype.lanes + 7) / 8; }

  bool same_dtype(const Tensor& other) const {
    const dlpack::DataType &a = view_.dtype, &b = other.view_.dtype;
    return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
  }

  bool is_int64() const { return view_.dtype.code == dlpack::kInt && view_.dtype.bits == 64; }
  bool is_uint8() const { return view_.dtype.code == dlpack::kUInt && view_.dtype.bits == 8; }

  // True and the dtype if it is one the kernels store.
  bool floating(DType* out) const {
    const dlpack::DataType& type = view_.dtype;
    if (type.lanes != 1) return false;
    if (type.code == dlpack::kBfloat && type.bits == 16) return *out = DType::kBFloat16, true;
    if (type.code != dlpack::kFloat) return false;
    if (type.bits == 16) return *out = DType::kFloat16, true;
    if (type.bits == 32) return *out = DType::kFloat32, true;
    if (type.bits == 64) return *out = DType::kFloat64, true;
    return false;
  }

  template <typename T>
  T* data() const {
    return reinterpret_cast<T*>(static_cast<char*>(view_.data) + view_.byte_offset);
  }

  void* current_stream() const {
    void* stream = nullptr;
    if (api_->current_work_stream(view_.device.type, view_.device.id, &stream) != 0) {
      throw pybind11::error_already_set();
    }
    return stream;
  }

 private:
  PyObject* object_ = Py_None;
  const dlpack::ExchangeApi* api_ = nullptr;
  bool readable_ = true;
  dlpack::TensorView view_{};
};

inline std::string shape_text(const int64_t* shape, int ndim) {
  std::string text = "[";
  for (int axis = 0; axis < ndim; ++axis) text += (axis ? ", " : "") + std::to_string(shape[axis]);
  return text + "]";
}

inline std::string attribute_text(const Tensor& tensor, const char* name) {
  return pybind11::str(pybind11::handle(tensor.object()).attr(name));
}

// The checks of one op's arguments. Each failure is one line: op, argument, what it was, what it must be.
class Checker {
 public:
  explicit Checker(const char* op) : op_(op) {}

  [[noreturn]] void fail(const char* argument, const std::string& was, const std::string& must) const {
    throw pybind11::value_error(std::string(op_) + ": " + argument + " " + was + ", must " + must);
  }

  // A non-empty contiguous tensor.
  void dense(const char* argument, const Tensor& tensor) const {
    if (!tensor.is_tensor()) {
      fail(argument, std::string("is a ") + Py_TYPE(tensor.object())->tp_name, "be a torch.Tensor");
    }
    if (!tensor.is_readable()) {
      fail(argument, "is on " + attribute_text(tensor, "device") + " with layout " + attribute_text(tensor, "layout"),
           "be a dense tensor on a CPU or a CUDA device");
    }
    if (tensor.numel() == 0) fail(argument, "is empty: shape " + shape_of(tensor), "have at least one element");
    if (!tensor.has_memory()) fail(argument, "has no memory", "have storage that was not resized to 0");
    if (!tensor.is_contiguous()) {
      fail(argument,
           "is not contiguous: shape " + shape_of(tensor) + ", strides " +
               std::string(pybind11::str(pybind11::handle(tensor.object()).attr("stride")())),
           "be contiguous (call .contiguous())");
    }
  }

  DType floating(const char* argument, const Tensor& tensor) const {
    DType dtype;
    if (!tensor.floating(&dtype)) {
      fail(argument, "has dtype " + attribute_text(tensor, "dtype"), "have float32, bfloat16, float16 or float64");
    }
    return dtype;
  }

  void dtype(const char* argument, const Tensor& tensor, DType wanted) const {
    DType found;
    if (!tensor.floating(&found) || found != wanted) {
      fail(argument, "has dtype " + attribute_text(tensor, "dtype"), std::string("have ") + name_of(wanted));
    }
  }

  void int64(const char* argument, const Tensor& tensor) const {
    if (!tensor.is_int64()) fail(argument, "has dtype " + attribute_text(tensor, "dtype"), "have torch.int64");
  }

  void uint8(const char* argument, const Tensor& tensor) const {
    if (!tensor.is_uint8()) fail(argument, "has dtype " + attribute_text(tensor, "dtype"), "have torch.uint8");
  }

  void shape(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> wanted) const {
    const int ndim = static_cast<int>(wanted.size());
    bool equal = tensor.ndim() == ndim;
    for (int axis = 0; equal && axis < ndim; ++axis) equal = tensor.size(axis) == wanted.begin()[axis];
    if (!equal) fail(argument, "has shape " + shape_of(tensor), "have " + shape_text(wanted.begin(), ndim));
  }

  void same_shape(const char* argument, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    bool equal = tensor.ndim() == other.ndim();
    for (int axis = 0; equal && axis < other.ndim(); ++axis) equal = tensor.size(axis) == other.size(axis);
    if (!equal) {
      fail(argument, "has shape " + shape_of(tensor), "have " + shape_of(other) + " as " + other_name + " has");
    }
  }

  void same_device(const char* argument, const Tensor& tensor, const char* other_name, const Tensor& other) const {
    if (tensor.device().type != other.device().type || tensor.device().id != other.device().id) {
      fail(argument, "is on " + attribute_text(tensor, "device"),
           "be on " + attribute_text(other, "device") + " as " + other_name + " is");
    }
  }

  static const char* name_of(DType dtype) {
    switch (dtype) {
      case DType::kFloat32:
        return "torch.float32";
      case DType::kBFloat16:
        return "torch.bfloat16";
      case DType::kFloat16:
        return "torch.float16";
      default:
        return "torch.float64";
    }
  }

  static std::string shape_of(const Tensor& tensor) {
    std::string text = "[";
    for (int axis = 0; axis < tensor.ndim(); ++axis) text += (axis ? ", " : "") + std::to_string(tensor.size(axis));
    return text + "]";
  }

 private:
  const char* op_;
};

}  // namespace flowgrpo_fast

// Every Python object converts: whether it is a tensor at all is checked where the argument's name is known.
template <>
struct pybind11::detail::type_caster<flowgrpo_fast::Tensor> {
  PYBIND11_TYPE_CASTER(flowgrpo_fast::Tensor, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    value = flowgrpo_fast::Tensor(source.ptr());
    return true;
  }
};
