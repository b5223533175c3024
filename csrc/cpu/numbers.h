// The 16-bit floats as the numbers that they stand for.
#pragma once
#include <cstdint>
#include <cstring>

namespace cwfast {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T>
T as(uint32_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(Bfloat16 x) { return as<float>(uint32_t{x.bits} << 16); }
inline float number(Float16 x) {  // without branches, so that the compiler makes vectors of it
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, bits = uint32_t{x.bits & 0x7fffu} << 13;
  constexpr uint32_t kExponent = 0x7c00u << 13, kRebias = 112u << 23;
  const uint32_t infinite = bits + 2 * kRebias, normal = bits + kRebias;
  const float tiny = as<float>(normal + (1u << 23)) - 0x1p-14f;  // without a subnormal float in between
  uint32_t small;
  std::memcpy(&small, &tiny, sizeof small);
  const uint32_t exponent = bits & kExponent;
  return as<float>(sign | (exponent == kExponent ? infinite : exponent ? normal : small));
}

}  // namespace cwfast
