// The residuals of velocity predictions on the CPU: chunks over the threads, then the ordered sums.
#include <vector>

#include "cpu_dispatch.h"
#include "matching.h"

namespace flowgrpo_fast::cpu {
namespace {

// Adds the partial sums of every mean and sample in order.
template <typename Real>
void store_means(const MatchingArgs& args) {
  const Residuals& residuals = args.residuals;
  const int64_t chunks = num_chunks(residuals.elements);
  const double* partial = args.partials;
  for (int mean = 0; mean < num_means(residuals); ++mean) {
    for (int64_t sample = 0; sample < residuals.batch; ++sample) {
      double sum = 0.0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += *partial++;
      static_cast<Real*>(args.means[mean])[sample] = static_cast<Real>(sum / static_cast<double>(residuals.elements));
    }
  }
}

}  // namespace

void matching(const MatchingArgs& args, int num_threads) {
  const Residuals& residuals = args.residuals;
  const int64_t count = residuals.batch * num_chunks(residuals.elements);
  std::vector<double> partials(static_cast<size_t>(num_means(residuals) * count));
  MatchingArgs work = args;
  work.partials = partials.data();
  run_items(FLOWGRPO_PICK(matching_chunk), work, count, residuals.batch * residuals.elements, num_threads);
  const DefaultFloatMode mode;
  residuals.velocity.dtype == DType::kFloat64 ? store_means<double>(work) : store_means<float>(work);
}

void matching_backward(const MatchingBackwardArgs& args, int num_threads) {
  const Residuals& residuals = args.residuals;
  run_items(FLOWGRPO_PICK(matching_backward_chunk), args, residuals.batch * num_chunks(residuals.elements),
            residuals.batch * residuals.elements, num_threads);
}

}  // namespace flowgrpo_fast::cpu
