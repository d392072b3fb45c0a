// Products of a weight with few rows. Every weight is read once, in a few places at a time.

#pragma once

#include "vectors.h"

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
