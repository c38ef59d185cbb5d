// Which GPU a call runs on.
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda_device.h"

namespace flowgrpo_fast::cuda {

DeviceGuard::DeviceGuard(int device) : previous_(device) {
  cudaError_t status = cudaGetDevice(&previous_);
  if (status == cudaSuccess && previous_ != device) status = cudaSetDevice(device);
  if (status != cudaSuccess) throw std::runtime_error(std::string("flowgrpo_fast: ") + cudaGetErrorString(status));
  if (previous_ == device) previous_ = -1;
}

DeviceGuard::~DeviceGuard() {
  if (previous_ >= 0) cudaSetDevice(previous_);
}

}  // namespace flowgrpo_fast::cuda
