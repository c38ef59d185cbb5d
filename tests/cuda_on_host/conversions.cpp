// The storage types of numeric.h and low_precision.h against the CUDA toolkit's own host versions: every code, and a
// few million values of all magnitudes. Prints the first difference of a type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp4.h>
#include <cuda_fp8.h>

#include <cmath>
#include <cstdio>

#include "low_precision.h"

using namespace flowgrpo_fast;

namespace {

int failures = 0;

struct Type {
  const char* name;
  uint32_t num_codes;
  float (*to_float)(uint32_t);
  uint32_t (*from_float)(float);
  float (*toolkit_to_float)(uint32_t);
  uint32_t (*toolkit_from_float)(float);
};

template <typename Half>
float halved(__half_raw raw) {
  return __half2float(Half(raw));
}

const Type kTypes[] = {
    {"bfloat16", 1u << 16, [](uint32_t code) { return bfloat16_to_float(static_cast<uint16_t>(code)); },
     [](float value) { return static_cast<uint32_t>(float_to_bfloat16(value)); },
     [](uint32_t code) {
       __nv_bfloat16_raw raw;
       raw.x = static_cast<unsigned short>(code);
       return __bfloat162float(__nv_bfloat16(raw));
     },
     [](float value) { return static_cast<uint32_t>(__nv_bfloat16_raw(__float2bfloat16_rn(value)).x); }},
    {"float16", 1u << 16, [](uint32_t code) { return float16_to_float(static_cast<uint16_t>(code)); },
     [](float value) { return static_cast<uint32_t>(float_to_float16(value)); },
     [](uint32_t code) {
       __half_raw raw;
       raw.x = static_cast<unsigned short>(code);
       return halved<__half>(raw);
     },
     [](float value) { return static_cast<uint32_t>(__half_raw(__float2half_rn(value)).x); }},
    {"E4M3", 1u << 8, [](uint32_t code) { return e4m3_to_float(code); },
     [](float value) { return float_to_e4m3(value); },
     [](uint32_t code) {
       return halved<__half>(__nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3));
     },
     [](float value) { return static_cast<uint32_t>(__nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)); }},
    {"E2M1", 1u << 4, [](uint32_t code) { return e2m1_to_float(code); },
     [](float value) { return float_to_e2m1(value); },
     [](uint32_t code) {
       return halved<__half>(__nv_cvt_fp4_to_halfraw(static_cast<__nv_fp4_storage_t>(code), __NV_E2M1));
     },
     [](float value) { return static_cast<uint32_t>(__nv_cvt_float_to_fp4(value, __NV_E2M1, cudaRoundNearest)); }},
};

void differ(const Type& type, const char* what, uint32_t input, uint32_t ours, uint32_t theirs) {
  printf("%s %s 0x%x: 0x%x, the toolkit has 0x%x\n", type.name, what, input, ours, theirs);
  ++failures;
}

// NaNs need only be NaNs: their payloads differ.
bool check_codes(const Type& type) {
  for (uint32_t code = 0; code < type.num_codes; ++code) {
    const float ours = type.to_float(code), theirs = type.toolkit_to_float(code);
    if (std::isnan(ours) && std::isnan(theirs)) continue;
    if (bits_of(ours) != bits_of(theirs)) return differ(type, "code", code, bits_of(ours), bits_of(theirs)), false;
  }
  return true;
}

bool check_value(const Type& type, uint32_t bits) {
  const uint32_t ours = type.from_float(float_of(bits)), theirs = type.toolkit_from_float(float_of(bits));
  if (ours == theirs) return true;
  if (std::isnan(type.to_float(ours)) && std::isnan(type.to_float(theirs))) return true;
  return differ(type, "value", bits, ours, theirs), false;
}

// Every 1021st float, and what lies on and beside every tie between two codes.
bool check_values(const Type& type) {
  for (uint64_t bits = 0; bits <= 0xffffffffu; bits += 1021) {
    if (!check_value(type, static_cast<uint32_t>(bits))) return false;
  }
  for (uint32_t code = 0; code + 1 < type.num_codes; ++code) {
    const uint32_t tie = bits_of(0.5f * (type.to_float(code) + type.to_float(code + 1)));
    for (uint32_t bits : {tie - 1, tie, tie + 1}) {
      if (!check_value(type, bits)) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  for (const Type& type : kTypes) check_codes(type) && check_values(type);
  return failures == 0 ? 0 : 1;
}
