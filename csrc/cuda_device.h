// Which GPU a call runs on.
#pragma once

namespace flowgrpo_fast::cuda {

// Makes a device current for the calling thread, and the previous one again.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
};

}  // namespace flowgrpo_fast::cuda
