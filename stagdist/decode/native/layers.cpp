// The layers of a decode step on a CPU: RMSNorm, products with few rows, rotary embeddings, attention, SwiGLU.
//
// A step is bound by the bytes of the weights that it reads. So every weight is read once for all rows, in a few places
// at a time; everything else happens in caches. Sums are in fp32, of fp64 tensors in fp64.
// `layer_math.py` has the same structures and checks shapes; nothing is checked here.

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

// --- products ------------------------------------------------------------------------------------------------------

template <class T> struct Weight {  // [rows, columns], by rows; int8 values have a scale for each row
    const void *values;
    const typename Math<T>::Sum *scales;
    int64_t rows, columns;
};

constexpr long AHEAD = 512;  // bytes: the processor's own prefetching stops at pages

// R rows of the weight, `apart` entries from each other, times M rows of x.
template <int R, int M, class W, class A>
INLINE void block(const W *w, long apart, const A *x, long columns, A sums[R][M]) {
    using V = typename Math<A>::Vector;
    constexpr long L = lanes<V>();
    V a[R][M] = {};
    long k = 0;
    for (; k + L <= columns; k += L) {
        V v[R];
        for (int r = 0; r < R; r++) {
            __builtin_prefetch((const char *)(w + r * apart + k) + AHEAD);
            v[r] = load<V>(w + r * apart + k);
        }
        for (int m = 0; m < M; m++) {
            V own = load<V>(x + m * columns + k);
            for (int r = 0; r < R; r++) a[r][m] += v[r] * own;
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            sums[r][m] = total(a[r][m]);
            for (long i = k; i < columns; i++) sums[r][m] += value(w[r * apart + i]) * x[m * columns + i];
        }
}

// Rows n, n + between, ... (R of them) of the weight times rows m to m + M - 1 of x, each sum to `put(m, n, sum)`.
template <int R, int M, class W, class A, class Put>
INLINE void rows_of(const W *w, const A *x, long m, long n, long between, long columns, Put put) {
    A sums[R][M];
    block<R, M>(w + n * columns, between * columns, x + m * columns, columns, sums);
    for (int r = 0; r < R; r++)
        for (int i = 0; i < M; i++) put(m + i, n + r * between, sums[r][i]);
}

// One or few rows of x: the weight is read in four places at once, which memory serves faster than one.
template <class W, class A, class Put>
void few_rows(const W *w, const A *x, long rows, long first, long stop, long columns, Put put) {
    const long each = (stop - first) / 4;
    for (long n = first; n < first + each; n++)
        for (long m = 0; m < rows; m++) rows_of<4, 1>(w, x, m, n, each, columns, put);
    for (long n = first + 4 * each; n < stop; n++)
        for (long m = 0; m < rows; m++) rows_of<1, 1>(w, x, m, n, 1, columns, put);
}

// More rows: a part of the weight stays in a cache while the rows of x pass, four at a time.
template <class W, class A, class Put>
void more_rows(const W *w, const A *x, long rows, long first, long stop, long columns, Put put) {
    const long each = (stop - first) / 3;
    long m = 0;
    for (; m + 4 <= rows; m += 4) {
        for (long n = first; n < first + each; n++) rows_of<3, 4>(w, x, m, n, each, columns, put);
        for (long n = first + 3 * each; n < stop; n++) rows_of<1, 4>(w, x, m, n, 1, columns, put);
    }
    if (m < rows) few_rows(w, x + m * columns, rows - m, first, stop, columns,
                           [&](long i, long n, A sum) { put(m + i, n, sum); });
}

template <class W, class A, class Put>
void product(const W *w, const A *scales, const A *x, long rows, long out, long columns, int threads, Put put) {
    auto scaled = [&](long m, long n, A sum) { put(m, n, scales ? sum * scales[n] : sum); };
    if (out == 0) return;  // a rank without a part of the vocabulary
    constexpr long MORE = sizeof(W) < 4 ? 4 : 6;
    const long each = rows < MORE ? (out + threads - 1) / threads : 24;
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (long part = 0; part < (out + each - 1) / each; part++) {
        const long first = part * each, stop = first + each < out ? first + each : out;
        if (rows < MORE) few_rows(w, x, rows, first, stop, columns, scaled);
        else more_rows(w, x, rows, first, stop, columns, scaled);
    }
}

// y = x W^T for all rows; W as floats or as int8.
template <class T, class Put>
void product(const Weight<T> &weight, const typename Math<T>::Sum *x, long rows, int threads, Put put) {
    if (weight.scales)
        product((const int8_t *)weight.values, weight.scales, x, rows, weight.rows, weight.columns, threads, put);
    else
        product((const T *)weight.values, weight.scales, x, rows, weight.rows, weight.columns, threads, put);
}

// --- rows ----------------------------------------------------------------------------------------------------------

template <class T> struct Rows {  // [count, width], any distance between rows
    T *data;
    int64_t stride, count;
};

template <class A> A *scratch(int which, long size) {
    static thread_local std::vector<A> memory[4];
    if ((long)memory[which].size() < size) memory[which].resize(size);
    return memory[which].data();
}

// RMSNorm of rows; `null` takes the place of the normalized row where `null_rows`.
template <class T, class A>
void normalize(Rows<T> rows, const T *gain, double eps, long width, const T *null, const uint8_t *null_rows, A *out) {
    for (long m = 0; m < rows.count; m++, out += width) {
        const T *row = rows.data + m * rows.stride;
        if (null_rows && null_rows[m]) {
            for (long i = 0; i < width; i++) out[i] = value(null[i]);
            continue;
        }
        A squares = 0;
        for (long i = 0; i < width; i++) out[i] = value(row[i]);
        squares = dot(out, out, width);
        A factor = 1 / std::sqrt(squares / width + A(eps));
        for (long i = 0; i < width; i++) out[i] *= factor * value(gain[i]);
    }
}

// --- attention -----------------------------------------------------------------------------------------------------

template <class T> struct Cells {  // where the rows are, and tables of rotary embeddings [positions, width]
    const int64_t *positions;      // one for `repeats` rows; -1 for rows without a request
    const T *cos, *sin;
    int64_t repeats, width;
};

template <class T> struct Cache {  // [2, slots, heads, entries + 1, width]; index 0 holds keys, 1 values
    T *data;
    int64_t heads, entries, kind_stride, slot_stride;
    T *head(long kind, long slot, long head, long width) const {
        return data + kind * kind_stride + slot * slot_stride + head * (entries + 1) * width;
    }
};

template <class T, class A> void rotate(const A *x, const Cells<T> &cells, long position, A *out) {
    const long half = cells.width / 2;
    const T *cos = cells.cos + position * cells.width, *sin = cells.sin + position * cells.width;
    for (long i = 0; i < half; i++) {  // the sign of the rotated half is in the sines
        out[i] = x[i] * value(cos[i]) + x[i + half] * value(sin[i]);
        out[i + half] = x[i + half] * value(cos[i + half]) + x[i] * value(sin[i + half]);
    }
}

template <class T, class A> void store_entry(const A *x, T *entry, long width) {
    for (long i = 0; i < width; i++) store(entry + i, x[i]);
}

// One query over entries 0 to count - 1. Shapes: keys and values [count, width].
template <class T, class A>
void attend(const A *query, const T *keys, const T *values, long count, long width, A *scores, A *out) {
    using V = typename Math<A>::Vector;
    constexpr long L = lanes<V>();
    const A scale = 1 / std::sqrt(A(width));
    A most = -INFINITY;
    for (long e = 0; e < count; e++) {
        scores[e] = dot(query, keys + e * width, width) * scale;
        most = scores[e] > most ? scores[e] : most;
    }
    for (long e = count; e % L; e++) scores[e] = -INFINITY;
    V sums{};
    for (long e = 0; e < count; e += L) {
        V weights = exponential(load<V>(scores + e) - most);
        for (long i = count - e; i < L; i++) weights[i] = 0;
        memcpy(scores + e, &weights, sizeof weights);
        sums += weights;
    }
    const A factor = 1 / total(sums);
    long first = 0;
    for (; first + 8 * L <= width; first += 8 * L) {
        V mixed[8] = {};
        for (long e = 0; e < count; e++)
            for (int j = 0; j < 8; j++) mixed[j] += scores[e] * load<V>(values + e * width + first + j * L);
        for (int j = 0; j < 8; j++) mixed[j] *= factor;
        memcpy(out + first, mixed, sizeof mixed);
    }
    for (long i = first; i < width; i++) out[i] = 0;
    for (long e = 0; first < width && e < count; e++)
        for (long i = first; i < width; i++) out[i] += scores[e] * value(values[e * width + i]);
    for (long i = first; i < width; i++) out[i] *= factor;
}

// All heads of all rows. Shapes: queries [rows, stride], rotated here; mixed [rows, heads * width].
template <class T, class A>
void attend_rows(const A *queries, long stride, long rows, long heads, const Cells<T> &cells, const Cache<T> &cache,
                 int threads, A *mixed) {
    const long width = cells.width, group = heads / cache.heads;
#pragma omp parallel for if (threads > 1) num_threads(threads) schedule(static)
    for (long part = 0; part < rows * cache.heads; part++) {
        const long row = part / cache.heads, head = part % cache.heads;
        const long position = cells.positions[row / cells.repeats];
        const long count = position < cache.entries ? position + 1 : cache.entries;
        A *scores = scratch<A>(2, cache.entries + 16 + width), *query = scores + cache.entries + 16;
        for (long h = head * group; h < (head + 1) * group; h++) {
            A *out = mixed + (row * heads + h) * width;
            if (position < 0) {
                memset(out, 0, width * sizeof(A));
                continue;
            }
            rotate(queries + row * stride + h * width, cells, position, query);
            attend(query, cache.head(0, row, head, width), cache.head(1, row, head, width), count, width, scores, out);
        }
    }
}

// Keys (rotated) and values of one row of one layer. Shapes: new [2, heads, width].
template <class T, class A>
void store_row(const A *fresh, const Cells<T> &cells, const Cache<T> &cache, long row) {
    const long position = cells.positions[row / cells.repeats], width = cells.width;
    if (position < 0) return;
    const long entry = position % cache.entries;
    A *turned = scratch<A>(3, width);
    for (long head = 0; head < cache.heads; head++) {
        rotate(fresh + head * width, cells, position, turned);
        store_entry(turned, cache.head(0, row, head, width) + entry * width, width);
        store_entry(fresh + (cache.heads + head) * width, cache.head(1, row, head, width) + entry * width, width);
    }
}

// --- the parts of a layer ------------------------------------------------------------------------------------------

template <class T> struct Part {
    Rows<T> rows;
    T *out;            // [count, H] next to each other, or `rows.data` itself
    int64_t out_stride, adds;  // adds: out = rows + result
    const T *gain;
    double eps;
    Weight<T> first, second;
    int64_t heads, threads;
    Cells<T> cells;
    Cache<T> cache;
    const T *null;
    const uint8_t *null_rows;
    int64_t layers, layer_stride;  // of a memory
};

template <class T, class A> void finish(const Part<T> &part, const A *x) {
    product(part.second, x, part.rows.count, part.threads, [&](long m, long n, A sum) {
        if (part.adds) sum += value(part.rows.data[m * part.rows.stride + n]);
        store(part.out + m * part.out_stride + n, sum);
    });
}

template <class T, class A> A *begin(const Part<T> &part, A *states) {
    A *x = scratch<A>(0, part.rows.count * part.first.columns);
    normalize(part.rows, part.gain, part.eps, part.first.columns, part.null, part.null_rows, x);
    const long width = part.first.rows;
    product(part.first, x, part.rows.count, part.threads, [=](long m, long n, A sum) { states[m * width + n] = sum; });
    return states;
}

// Self-attention where `stores`, else cross-attention.
template <class T> void attention(const Part<T> &part, bool stores) {
    using A = typename Math<T>::Sum;
    const long rows = part.rows.count, width = part.first.rows, inner = part.heads * part.cells.width;
    A *states = begin(part, scratch<A>(1, rows * (width + inner))), *mixed = states + rows * width;
    for (long m = 0; stores && m < rows; m++) store_row(states + m * width + inner, part.cells, part.cache, m);
    attend_rows(states, width, rows, part.heads, part.cells, part.cache, part.threads, mixed);
    finish(part, mixed);
}

// SiLU of the gates, times `up`.
template <class A> void swiglu(const A *gates, const A *up, long count, A *out) {
    using V = typename Math<A>::Vector;
    constexpr long L = lanes<V>();
    long i = 0;
    for (; i + L <= count; i += L) {
        const V gate = load<V>(gates + i), small = exponential(gate < 0 ? gate : -gate);  // neither overflows
        const V result = gate * (gate < 0 ? small : small * 0 + 1) / (1 + small) * load<V>(up + i);
        memcpy(out + i, &result, sizeof result);
    }
    for (; i < count; i++) out[i] = gates[i] / (1 + std::exp(-gates[i])) * up[i];
}

template <class T> void mlp(const Part<T> &part) {
    using A = typename Math<T>::Sum;
    const long rows = part.rows.count, inner = part.second.columns;
    A *states = begin(part, scratch<A>(1, rows * 3 * inner)), *x = states + rows * 2 * inner;
#pragma omp parallel for if (part.threads > 1) num_threads(part.threads) schedule(static)
    for (long m = 0; m < rows; m++) swiglu(states + m * 2 * inner, states + (2 * m + 1) * inner, inner, x + m * inner);
    finish(part, x);
}

template <class T> void write_memory(const Part<T> &part) {
    using A = typename Math<T>::Sum;
    const long rows = part.rows.count, width = part.first.rows, each = width / part.layers;
    A *states = begin(part, scratch<A>(1, rows * width));
    for (long layer = 0; layer < part.layers; layer++) {
        Cache<T> cache = part.cache;
        cache.data += layer * part.layer_stride;
        for (long m = 0; m < rows; m++) store_row(states + m * width + layer * each, part.cells, cache, m);
    }
}

template <class T> void norm_linear(const Part<T> &part) {
    using A = typename Math<T>::Sum;
    A *x = scratch<A>(0, part.rows.count * part.first.columns);
    normalize(part.rows, part.gain, part.eps, part.first.columns, part.null, part.null_rows, x);
    product(part.first, x, part.rows.count, part.threads,
            [&](long m, long n, A sum) { store(part.out + m * part.out_stride + n, sum); });
}

#define EXPORT(T, name)                                                                                    \
    extern "C" void self_attention_##name(const Part<T> *part) { attention(*part, true); }                 \
    extern "C" void cross_attention_##name(const Part<T> *part) { attention(*part, false); }               \
    extern "C" void mlp_##name(const Part<T> *part) { mlp(*part); }                                        \
    extern "C" void write_memory_##name(const Part<T> *part) { write_memory(*part); }                      \
    extern "C" void norm_linear_##name(const Part<T> *part) { norm_linear(*part); }
EXPORT(float, fp32)
EXPORT(double, fp64)
EXPORT(bfloat16, bf16)
