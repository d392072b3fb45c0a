// Elements of tensors, and vectors of them.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))

struct bfloat16 { uint16_t bits; };

// Sums of an element type, and vectors of them with 32 bytes.
template <class T> struct Math { using Sum = float; typedef float Vector __attribute__((vector_size(32))); };
template <> struct Math<double> { using Sum = double; typedef double Vector __attribute__((vector_size(32))); };
template <class V> constexpr long lanes() { return sizeof(V) / sizeof(V{}[0]); }

INLINE float value(float x) { return x; }
INLINE double value(double x) { return x; }
INLINE float value(int8_t x) { return x; }
INLINE float value(bfloat16 x) { uint32_t bits = uint32_t(x.bits) << 16; float y; memcpy(&y, &bits, 4); return y; }

INLINE void store(float *p, float x) { *p = x; }
INLINE void store(double *p, double x) { *p = x; }
INLINE void store(bfloat16 *p, float x) {  // rounds to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    p->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Loads one vector of elements as sums.
template <class V, class T> INLINE V load(const T *p) {
    V v;
    if constexpr (sizeof(T) == sizeof(v[0])) memcpy(&v, p, sizeof v);
    else for (long i = 0; i < lanes<V>(); i++) v[i] = value(p[i]);
    return v;
}
template <> INLINE Math<float>::Vector load(const bfloat16 *p) {
    typedef uint16_t Halves __attribute__((vector_size(16)));
    typedef uint32_t Words __attribute__((vector_size(32)));
    Halves halves;
    memcpy(&halves, p, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Math<float>::Vector v;
    memcpy(&v, &words, sizeof v);
    return v;
}
#if defined(__AVX2__)
template <> INLINE Math<float>::Vector load(const int8_t *p) {
    return (Math<float>::Vector)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p)));
}
#endif

template <class V> INLINE auto total(V v) {
    auto sum = v[0];
    for (long i = 1; i < lanes<V>(); i++) sum += v[i];
    return sum;
}
#if defined(__AVX2__)
template <> INLINE auto total(Math<float>::Vector v) {
    __m128 a = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
}
#endif

// e^x of a vector, x <= 0. A polynomial for the fraction of a power of two; its relative error is below
// 2e-7 + 6e-8 |x|.
INLINE Math<float>::Vector exponential(Math<float>::Vector x) {
    typedef int32_t Words __attribute__((vector_size(32)));
    Math<float>::Vector y = x * 1.44269504f, floor, p;
    y = y < -126.0f ? Math<float>::Vector{} - 126.0f : y;
    Words power = __builtin_convertvector(y - 0.5f, Words);  // rounds to nearest, since y is negative
    floor = __builtin_convertvector(power, Math<float>::Vector);
    y -= floor;
    p = 1.535336188319500e-4f * y + 1.339887440266574e-3f;
    p = p * y + 9.618437357674640e-3f;
    p = p * y + 5.550332471162809e-2f;
    p = p * y + 2.402264791363012e-1f;
    p = p * y + 6.931472028550421e-1f;
    p = p * y + 1.0f;
    power = (power + 127) << 23;
    Math<float>::Vector scale;
    memcpy(&scale, &power, sizeof scale);
    return p * scale;
}
INLINE Math<double>::Vector exponential(Math<double>::Vector x) {
    for (int i = 0; i < 4; i++) x[i] = std::exp(x[i]);
    return x;
}

template <class A, class T> INLINE A dot(const A *x, const T *y, long n) {
    using V = typename Math<A>::Vector;
    constexpr long L = lanes<V>();
    V a{}, b{};
    long i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
        a += load<V>(x + i) * load<V>(y + i);
        b += load<V>(x + i + L) * load<V>(y + i + L);
    }
    A sum = total(a + b);
    for (; i < n; i++) sum += x[i] * value(y[i]);
    return sum;
}
