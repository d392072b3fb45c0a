// The layers of a decode step on a CPU: RMSNorm, products with few rows, rotary embeddings, attention, SwiGLU.
//
// A step is bound by the bytes of the weights that it reads. So every weight is read once for all rows, in a few places
// at a time; everything else happens in caches. Sums are in fp32, of fp64 tensors in fp64.
// `layer_math.py` has the same structures and checks shapes; nothing is checked here.

#include "products.h"

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
