// Eight and four bits a value. Codes and E4M3 scales arrive as bytes: their own dtypes are checked in Python.
#pragma once

#include <array>

#include "bindings.h"
#include "quantize.h"

namespace flowgrpo_fast {
namespace {

int64_t columns_of(const Tensor& tensor) { return tensor.size(tensor.ndim() - 1); }

// The arguments around one tensor, whose device all others share.
class QuantizeParser {
 public:
  QuantizeParser(const char* op, const char* argument, const Tensor& tensor)
      : check(op), name(argument), where(tensor) {
    check.dense(argument, tensor);
    if (tensor.ndim() < 1) check.fail(argument, "has 0 dimensions", "be [..., columns]");
    const auto [type, id] = tensor.device();
    if (type != dlpack::kCpu && type != dlpack::kCuda) {
      check.fail(argument, "is on " + attribute_text(tensor, "device"), "be on a CPU or a CUDA device");
    }
  }

  // 16- or 32-bit floating-point values.
  Buffer values(const char* argument, const Tensor& tensor) const {
    DType dtype;
    if (!tensor.floating(&dtype) || dtype == DType::kFloat64) {
      check.fail(argument, "has dtype " + attribute_text(tensor, "dtype"), "have float32, bfloat16 or float16");
    }
    return {tensor.data<void>(), dtype};
  }

  Buffer values(const char* argument, const Tensor& tensor, int64_t rows, int64_t columns) const {
    check.dense(argument, tensor);
    check.shape(argument, tensor, {rows, columns});
    check.same_device(argument, tensor, name, where);
    return values(argument, tensor);
  }

  uint8_t* bytes(const char* argument, const Tensor& tensor, int64_t rows, int64_t columns) const {
    check.dense(argument, tensor);
    check.uint8(argument, tensor);
    check.shape(argument, tensor, {rows, columns});
    check.same_device(argument, tensor, name, where);
    return tensor.data<uint8_t>();
  }

  float* floats(const char* argument, const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    check.dense(argument, tensor);
    check.dtype(argument, tensor, DType::kFloat32);
    check.shape(argument, tensor, shape);
    check.same_device(argument, tensor, name, where);
    return tensor.data<float>();
  }

  // Columns of a block of 16 values: as many, or of codes half as many.
  void whole_blocks(const char* argument, int64_t columns, int64_t block) const {
    if (columns % block) {
      check.fail(argument, "has " + std::to_string(columns) + " columns",
                 "have a multiple of " + std::to_string(block));
    }
  }

  Checker check;
  const char* name;
  const Tensor& where;
};

// fields = (values, lora_a or None, lora_b or None, lora_scale)
Matrix parse_matrix(const QuantizeParser& parsed, const py::tuple& fields) {
  has_fields(parsed.check, "matrix", fields, 4);
  const Tensor &values = parsed.where, lora_a = tensor_at(fields, 1), lora_b = tensor_at(fields, 2);
  Matrix matrix{};
  matrix.values = parsed.values(parsed.name, values);
  matrix.columns = columns_of(values);
  matrix.rows = values.numel() / matrix.columns;
  if (lora_a.is_none()) return matrix;
  parsed.check.dense("lora_a", lora_a);
  if (lora_a.ndim() != 2) {
    parsed.check.fail("lora_a", "has " + std::to_string(lora_a.ndim()) + " dimension(s)", "be [rank, columns]");
  }
  matrix.rank = lora_a.size(0);
  if (matrix.rank > kMaxRank) {
    parsed.check.fail("lora_a", "has rank " + std::to_string(matrix.rank),
                      "have a rank of " + std::to_string(kMaxRank) + " at most");
  }
  matrix.lora_a = parsed.values("lora_a", lora_a, matrix.rank, matrix.columns);
  matrix.lora_b = parsed.values("lora_b", lora_b, matrix.rows, matrix.rank);
  matrix.lora_scale = fields[3].cast<float>();
  return matrix;
}

const char* op_of(const py::tuple& fields, const char* plain) {
  return tensor_at(fields, 1).is_none() ? plain : "merge_lora_quantize_";
}

const char* input_of(const py::tuple& fields) { return tensor_at(fields, 1).is_none() ? "x" : "weight"; }

void quantize_fp8_rows(const py::tuple& fields, const Tensor& codes, const Tensor& scale, int num_threads) {
  const Tensor values = tensor_at(fields, 0);
  const QuantizeParser parsed(op_of(fields, "quantize_fp8_rows"), input_of(fields), values);
  QuantizeFp8Args args{};
  args.matrix = parse_matrix(parsed, fields);
  args.codes = parsed.bytes("codes", codes, args.matrix.rows, args.matrix.columns);
  args.scale = parsed.floats("scale", scale, {args.matrix.rows, 1});
  run(values, args, num_threads, cpu::quantize_fp8_rows, FLOWGRPO_ON_CUDA(quantize_fp8_rows));
}

// Rows and columns of the array that holds the scales.
std::array<int64_t, 2> scale_shape(int64_t rows, int64_t columns, bool swizzle) {
  const int64_t blocks = columns / kBlockSize;
  return swizzle ? std::array{round_up(rows, kTileRows), round_up(blocks, kTileColumns)} : std::array{rows, blocks};
}

// outputs = (codes, scales, global_scale, workspace or None)
void quantize_nvfp4(const py::tuple& fields, const py::tuple& outputs, bool is_static, bool swizzle, int num_threads) {
  const Tensor values = tensor_at(fields, 0), workspace = tensor_at(outputs, 3);
  const QuantizeParser parsed(op_of(fields, "quantize_nvfp4"), input_of(fields), values);
  has_fields(parsed.check, "outputs", outputs, 4);
  QuantizeNvfp4Args args{};
  args.matrix = parse_matrix(parsed, fields);
  parsed.whole_blocks(parsed.name, args.matrix.columns, kBlockSize);
  const auto [scale_rows, scale_columns] = scale_shape(args.matrix.rows, args.matrix.columns, swizzle);
  args.codes = parsed.bytes("codes", tensor_at(outputs, 0), args.matrix.rows, args.matrix.columns / 2);
  args.scales = parsed.bytes("scales", tensor_at(outputs, 1), scale_rows, scale_columns);
  args.global_scale = parsed.floats("global_scale", tensor_at(outputs, 2), {});
  args.scale_rows = scale_rows;
  args.scale_columns = scale_columns;
  args.is_static = is_static;
  args.swizzle = swizzle;
  if (!workspace.is_none()) args.partials = parsed.floats("workspace", workspace, {kMaxPartials});
  run(values, args, num_threads, cpu::quantize_nvfp4, FLOWGRPO_ON_CUDA(quantize_nvfp4));
}

void dequantize_fp8_rows(const Tensor& codes, const Tensor& scale, const Tensor& out, int num_threads) {
  const QuantizeParser parsed("dequantize_fp8_rows", "codes", codes);
  DequantizeFp8Args args{};
  args.columns = columns_of(codes);
  args.rows = codes.numel() / args.columns;
  args.codes = parsed.bytes("codes", codes, args.rows, args.columns);
  args.scale = parsed.floats("scale", scale, {args.rows, 1});
  args.values = parsed.values("out", out, args.rows, args.columns);
  run(codes, args, num_threads, cpu::dequantize_fp8_rows, FLOWGRPO_ON_CUDA(dequantize_fp8_rows));
}

// fields = (codes, scales, global_scale)
void dequantize_nvfp4(const py::tuple& fields, const Tensor& out, bool swizzle, int num_threads) {
  const Tensor codes = tensor_at(fields, 0);
  const QuantizeParser parsed("dequantize_nvfp4", "codes", codes);
  has_fields(parsed.check, "fields", fields, 3);
  DequantizeNvfp4Args args{};
  args.columns = 2 * columns_of(codes);
  args.rows = codes.numel() / columns_of(codes);
  args.codes = parsed.bytes("codes", codes, args.rows, args.columns / 2);
  parsed.whole_blocks("codes", columns_of(codes), kBlockSize / 2);
  const auto [scale_rows, scale_columns] = scale_shape(args.rows, args.columns, swizzle);
  args.scales = parsed.bytes("scales", tensor_at(fields, 1), scale_rows, scale_columns);
  args.global_scale = parsed.floats("global_scale", tensor_at(fields, 2), {});
  args.values = parsed.values("out", out, args.rows, args.columns);
  args.scale_columns = scale_columns;
  args.swizzle = swizzle;
  run(codes, args, num_threads, cpu::dequantize_nvfp4, FLOWGRPO_ON_CUDA(dequantize_nvfp4));
}

}  // namespace

inline void bind_quantize(py::module_& module) {
  module.def("quantize_fp8_rows", &quantize_fp8_rows);
  module.def("quantize_nvfp4", &quantize_nvfp4);
  module.def("dequantize_fp8_rows", &dequantize_fp8_rows);
  module.def("dequantize_nvfp4", &dequantize_nvfp4);
}

}  // namespace flowgrpo_fast
