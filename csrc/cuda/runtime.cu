// What the CUDA runtime says of this machine. Not yet run on a GPU; without a driver it answers with error 35.
#include "common/device.h"
#include "cuda/launchers.h"

extern "C" int cwfast_cuda_device_count(int* count) { return cudaGetDeviceCount(count); }

extern "C" const char* cwfast_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
