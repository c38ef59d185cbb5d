// Prints hashes of the bits that the baseline kernels give, to be compared between processors.
#include <cstdio>
#include <vector>

#include "flow_step.h"

using namespace flowgrpo_fast;

namespace {

struct Hash {
  uint64_t value = 1469598103934665603ull;  // FNV-1a
  void add(uint64_t bits) { value = (value ^ bits) * 1099511628211ull; }
};

constexpr int64_t kBatch = 3, kElements = 100003;

}  // namespace

int main() {
  std::vector<float> latents(kBatch * kElements), velocity(kBatch * kElements), next(kBatch * kElements);
  Hash normals, step;
  for (int64_t i = 0; i < kBatch * kElements; ++i) {
    const PhiloxWords words = philox4x32_10(philox_counter(i, 7, 1), philox_key(5));
    const NormalPair pair = box_muller(words.word[0], words.word[1]);
    latents[i] = pair.first;
    velocity[i] = 1.3f * pair.second;
    normals.add(bits_of(pair.first));
    normals.add(bits_of(pair.second));
  }
  const float row[kRowWidth] = {0.9f, 0.98f, -0.11f, 0.31f, 0.0f, 10.4f, 0.25f, 0.0f};
  const int64_t seed[kBatch] = {1, 2, -3};
  std::vector<double> partials(kBatch * num_chunks(kElements));
  FlowStepArgs args{};
  args.transition.latents = {latents.data(), DType::kFloat32};
  args.transition.velocity = {velocity.data(), DType::kFloat32};
  args.transition.coeffs = row;
  args.transition.num_steps = 1;
  args.transition.batch = kBatch;
  args.transition.elements = kElements;
  args.seed = seed;
  args.next_latents = {next.data(), DType::kFloat32};
  args.partials = partials.data();
  for (int64_t i = 0; i < kBatch * num_chunks(kElements); ++i) baseline::flow_step_chunk(args, i);
  for (float value : next) step.add(bits_of(value));
  for (double value : partials) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    step.add(bits);
  }
  printf("normals %016llx step %016llx\n", static_cast<unsigned long long>(normals.value),
         static_cast<unsigned long long>(step.value));
}
