/* The kernels for one pair (STORED, REAL); see compiled.c. All return 0, or 1 where memory could not be had.

   rows: K rows, `ld` numbers apart; diag: d, NULL for ones. Where d is zero the coordinate is a point mass: weight 0. */

typedef REAL NAME(vector) __attribute__((vector_size(BYTES)));
typedef STORED NAME(stored) __attribute__((vector_size(BYTES / sizeof(REAL) * sizeof(STORED)), aligned(sizeof(STORED))));
typedef REAL NAME(loose) __attribute__((vector_size(BYTES), aligned(sizeof(REAL))));
#define VEC NAME(vector)
#define LOAD(p) __builtin_convertvector(*(const NAME(stored) *)(p), VEC)

/* The sum of the lanes: by halves in registers down to the four lanes or fewer that are added in double. */
typedef REAL NAME(half) __attribute__((vector_size(BYTES / 2)));
typedef REAL NAME(quarter) __attribute__((vector_size(BYTES / 4)));
static inline double NAME(total)(VEC v) {
    NAME(half) halves[2];
    NAME(quarter) quarters[2];
    memcpy(halves, &v, sizeof v);
    const NAME(half) half = halves[0] + halves[1];
    memcpy(quarters, &half, sizeof half);
    const NAME(quarter) quarter = quarters[0] + quarters[1];
    double sum = 0;
    for (int i = 0; i < LANES / 4; i++) sum += quarter[i];
    return sum;
}

/* Add the TILE x TILE dot products of rows a and b to `out`; meanwhile fetch two rows of the next block. */
static void NAME(tile)(const REAL *const *a, const REAL *const *b, double *out, int side, const STORED *ahead,
                       const STORED *next) {
    VEC sums[TILE][TILE];
    memset(sums, 0, sizeof sums);
    for (int i = 0; i < BLOCK; i += LANES) {
        VEC x[TILE], y[TILE];
        for (int t = 0; t < TILE; t++) {
            x[t] = *(const NAME(loose) *)(a[t] + i);
            y[t] = *(const NAME(loose) *)(b[t] + i);
            IN_REGISTER(x[t]);
            IN_REGISTER(y[t]);
        }
        for (int p = 0; p < TILE; p++)
            for (int q = 0; q < TILE; q++) sums[p][q] += x[p] * y[q];
        __builtin_prefetch(ahead + i, 0, 2);
        __builtin_prefetch(next + i, 0, 2);
    }
    for (int p = 0; p < TILE; p++)
        for (int q = 0; q < TILE; q++) out[p * side + q] += NAME(total)(sums[p][q]);
}

/* Add the dot products of k buffered rows with a buffered vector, and of the vector with itself, to `out` (k + 1). */
static void NAME(dots)(const REAL *rows, int k, const REAL *vector, double *out) {
    for (int r = 0; r < k; r += TILE) { /* the buffer has zeros beyond row k */
        VEC sums[TILE];
        memset(sums, 0, sizeof sums);
        for (int i = 0; i < BLOCK; i += LANES) {
            const VEC v = *(const VEC *)(vector + i);
            for (int t = 0; t < TILE; t++) sums[t] += *(const VEC *)(rows + (r + t) * STRIDE + i) * v;
        }
        for (int t = 0; t < TILE && r + t < k; t++) out[r + t] += NAME(total)(sums[t]);
    }
    VEC norm = {0};
    for (int i = 0; i < BLOCK; i += LANES) norm += *(const VEC *)(vector + i) * *(const VEC *)(vector + i);
    out[k] += NAME(total)(norm);
}

/* gram (k x k) = R' diag(d)^-1 R and, unless x is NULL, projected (k + 1) as `project` gives it, in the same pass. */
int NAME(gram)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const STORED *diag, const STORED *x,
               const STORED *mean, double *gram, double *projected, int threads) {
    const int side = (k + TILE - 1) / TILE * TILE, tiles = side / TILE;
    const size_t square = (size_t)side * side, area = square + k + 1;
    double *sums = calloc(PIECES * area, sizeof(double));
    int failed = sums == NULL;
#pragma omp parallel num_threads(threads)
    {
        const size_t size = sizeof(REAL) * (size_t)STRIDE * (side + 2);
        REAL *buffer = aligned_alloc(BYTES, size);
        const REAL **row = malloc(side * sizeof *row);
        if (buffer == NULL || row == NULL) {
#pragma omp atomic write
            failed = 1;
        } else {
            memset(buffer, 0, size);
        }
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
        for (int piece = 0; piece < PIECES; piece++) {
            if (failed) continue;
            REAL *weight = buffer + (size_t)STRIDE * side, *vector = weight + STRIDE;
            double *sum = sums + piece * area;
            FOR_BLOCKS(piece, dim, block) {
                const ptrdiff_t start = block * BLOCK;
                const int n = WIDTH(dim, start);
                /* Rows are multiplied where they are if they are whole, unweighted and of the type computed in. */
                const int direct = diag == NULL && x == NULL && n == BLOCK && sizeof(STORED) == sizeof(REAL);
                for (int i = 0; i < n && !direct; i++) {
                    const REAL d = diag == NULL ? 1 : diag[start + i];
                    weight[i] = d > 0 ? 1 / (sizeof(REAL) == 4 ? sqrtf(d) : sqrt(d)) : 0;
                }
                for (int r = 0; r < side; r++)
                    row[r] = direct ? (const REAL *)(rows + (r < k ? r : k - 1) * ld + start) : buffer + (size_t)r * STRIDE;
                for (int r = 0; r < k && !direct; r++) {
                    const STORED *source = rows + r * ld + start;
                    REAL *target = buffer + (size_t)r * STRIDE;
                    for (int i = 0; i < n; i++) target[i] = source[i] * weight[i];
                    if (n < BLOCK) memset(target + n, 0, sizeof(REAL) * (BLOCK - n));
                }
                if (x != NULL) {
                    for (int i = 0; i < n; i++)
                        vector[i] = ((REAL)x[start + i] - (mean == NULL ? 0 : (REAL)mean[start + i])) * weight[i];
                    if (n < BLOCK) memset(vector + n, 0, sizeof(REAL) * (BLOCK - n));
                    NAME(dots)(buffer, k, vector, sum + square);
                }
                int fetched = 0;
                for (int p = 0; p < tiles; p++)
                    for (int q = p; q < tiles; q++, fetched += 2) {
                        const int one = fetched < k ? fetched : k - 1, two = fetched + 1 < k ? fetched + 1 : k - 1;
                        NAME(tile)(row + p * TILE, row + q * TILE, sum + (p * side + q) * TILE, side,
                                   rows + one * ld + start + BLOCK, rows + two * ld + start + BLOCK);
                    }
            }
        }
        free(buffer);
        free(row);
    }
    if (!failed) {
        add_pieces(sums, area);
        for (int p = 0; p < k; p++)
            for (int q = 0; q < k; q++) gram[p * k + q] = p / TILE <= q / TILE ? sums[p * side + q] : sums[q * side + p];
        if (x != NULL) memcpy(projected, sums + square, (k + 1) * sizeof(double));
    }
    free(sums);
    return failed;
}

/* Add the block of R' w to `sum`. */
static inline void NAME(add_dots)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t start, int n, const REAL *w, double *sum) {
    const int whole = n / LANES * LANES;
    for (int r = 0; r < k; r += 4) { /* four rows for one read of the vector */
        const STORED *row[4];
        VEC dot[4];
        memset(dot, 0, sizeof dot);
        for (int t = 0; t < 4; t++) row[t] = rows + (r + t < k ? r + t : k - 1) * ld + start;
        for (int i = 0; i < whole; i += LANES) {
            const VEC v = *(VEC *)(w + i);
            for (int t = 0; t < 4; t++) {
                dot[t] += LOAD(row[t] + i) * v;
                __builtin_prefetch(row[t] + i + BLOCK, 0, 2);
            }
        }
        for (int t = 0; t < 4 && r + t < k; t++) {
            double tail = NAME(total)(dot[t]);
            for (int i = whole; i < n; i++) tail += (double)row[t][i] * w[i];
            sum[r + t] += tail;
        }
    }
}

/* sums (k + 1) = R' diag(d)^-1 (x - mean), and (x - mean)' diag(d)^-1 (x - mean) in the last place. */
int NAME(project)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const STORED *diag, const STORED *x,
                  const STORED *mean, double *sums, int threads) {
    double *partial = calloc((size_t)PIECES * (k + 1), sizeof(double));
    if (partial == NULL) return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int piece = 0; piece < PIECES; piece++) {
        REAL weighted[BLOCK] __attribute__((aligned(BYTES)));
        REAL centred[BLOCK] __attribute__((aligned(BYTES)));
        double *sum = partial + (size_t)piece * (k + 1);
        FOR_BLOCKS(piece, dim, block) {
            const ptrdiff_t start = block * BLOCK;
            const int n = WIDTH(dim, start), whole = n / LANES * LANES;
            for (int i = 0; i < n; i++) {
                const REAL d = diag == NULL ? 1 : diag[start + i];
                centred[i] = (REAL)x[start + i] - (mean == NULL ? 0 : (REAL)mean[start + i]);
                weighted[i] = d > 0 ? centred[i] / d : 0;
            }
            VEC norm = {0};
            for (int i = 0; i < whole; i += LANES) norm += *(VEC *)(weighted + i) * *(VEC *)(centred + i);
            sum[k] += NAME(total)(norm);
            for (int i = whole; i < n; i++) sum[k] += (double)weighted[i] * centred[i];
            NAME(add_dots)(rows, ld, k, start, n, weighted, sum);
        }
    }
    add_pieces(partial, k + 1);
    memcpy(sums, partial, (k + 1) * sizeof(double));
    free(partial);
    return 0;
}

/* Add the block of R z to `target`. */
static inline void NAME(add_rows)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t start, int n, const REAL *z,
                                  REAL *restrict target) {
    for (int r = 0; r < k; r += 4) { /* z is padded with zeros to a multiple of four */
        const STORED *row[4];
        for (int t = 0; t < 4; t++) row[t] = rows + (r + t < k ? r + t : k - 1) * ld + start;
        const int whole = n / LANES * LANES;
        for (int i = 0; i < whole; i += LANES) {
            VEC *to = (VEC *)(target + i);
            *to += (z[r] * LOAD(row[0] + i) + z[r + 1] * LOAD(row[1] + i)) +
                   (z[r + 2] * LOAD(row[2] + i) + z[r + 3] * LOAD(row[3] + i));
            for (int t = 0; t < 4; t++) __builtin_prefetch(row[t] + i + BLOCK, 0, 2);
        }
        for (int i = whole; i < n; i++)
            target[i] += (z[r] * row[0][i] + z[r + 1] * row[1][i]) + (z[r + 2] * row[2][i] + z[r + 3] * row[3][i]);
    }
}

/* Return K numbers as REAL, with the given sign, padded with zeros to a multiple of four; NULL without memory. */
static REAL *NAME(padded)(const double *z, int k, double sign) {
    REAL *copy = calloc((size_t)k + 3, sizeof(REAL));
    for (int r = 0; copy != NULL && r < k; r++) copy[r] = (REAL)(sign * z[r]);
    return copy;
}

/* x = x - R z, in place; sums (k + 1) = R' x for the new x if asked for, and |x|^2 in the last place. */
int NAME(subtract)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const double *z, STORED *x, int project,
                   double *sums, int threads) {
    REAL *weights = NAME(padded)(z, k, -1.0);
    double *partial = calloc((size_t)PIECES * (k + 1), sizeof(double));
    const int failed = weights == NULL || partial == NULL;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int piece = 0; piece < (failed ? 0 : PIECES); piece++) {
        REAL left[BLOCK] __attribute__((aligned(BYTES)));
        double *sum = partial + (size_t)piece * (k + 1);
        FOR_BLOCKS(piece, dim, block) {
            const ptrdiff_t start = block * BLOCK;
            const int n = WIDTH(dim, start), whole = n / LANES * LANES;
            for (int i = 0; i < n; i++) left[i] = (REAL)x[start + i];
            NAME(add_rows)(rows, ld, k, start, n, weights, left);
            for (int i = 0; i < n; i++) left[i] = x[start + i] = (STORED)left[i];
            VEC norm = {0};
            for (int i = 0; i < whole; i += LANES) norm += *(VEC *)(left + i) * *(VEC *)(left + i);
            sum[k] += NAME(total)(norm);
            for (int i = whole; i < n; i++) sum[k] += (double)left[i] * left[i];
            if (project) NAME(add_dots)(rows, ld, k, start, n, left, sum); /* the rows are in the cache still */
        }
    }
    if (!failed) {
        add_pieces(partial, k + 1);
        memcpy(sums, partial, (k + 1) * sizeof(double));
    }
    free(weights);
    free(partial);
    return failed;
}

/* With v = x - mean and r = v - R z: solution = r / d unless NULL, and
   sums (3) = r' diag(d)^-1 r, |r / d|^2, |v / d|^2. */
int NAME(residual)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const STORED *diag, const STORED *x,
                   const STORED *mean, const double *z, STORED *solution, double *sums, int threads) {
    double partial[PIECES * 3] = {0};
    REAL *weights = NAME(padded)(z, k, -1.0);
    if (weights == NULL) return 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int piece = 0; piece < PIECES; piece++) {
        REAL residual[BLOCK] __attribute__((aligned(BYTES)));
        REAL weight[BLOCK] __attribute__((aligned(BYTES)));
        FOR_BLOCKS(piece, dim, block) {
            const ptrdiff_t start = block * BLOCK;
            const int n = WIDTH(dim, start);
            double square = 0, solved = 0, before = 0;
            for (int i = 0; i < n; i++) {
                const REAL d = diag[start + i];
                weight[i] = d > 0 ? 1 / d : 0;
                residual[i] = (REAL)x[start + i] - (mean == NULL ? 0 : (REAL)mean[start + i]);
            }
            VEC sum[3];
            memset(sum, 0, sizeof sum);
            const int whole = n / LANES * LANES;
            if (solution != NULL)
                for (int i = 0; i < n; i += LANES) {
                    if (i < whole) {
                        const VEC v = *(VEC *)(residual + i) * *(VEC *)(weight + i);
                        sum[2] += v * v;
                    } else {
                        for (int j = i; j < n; j++) before += (double)(residual[j] * weight[j]) * (residual[j] * weight[j]);
                    }
                }
            NAME(add_rows)(rows, ld, k, start, n, weights, residual);
            for (int i = 0; i < whole; i += LANES) {
                const VEC r = *(VEC *)(residual + i), v = r * *(VEC *)(weight + i);
                sum[0] += r * v;
                sum[1] += v * v;
            }
            for (int i = whole; i < n; i++) {
                const REAL v = residual[i] * weight[i];
                square += (double)residual[i] * v;
                solved += (double)v * v;
            }
            if (solution != NULL)
                for (int i = 0; i < n; i++) solution[start + i] = (STORED)(residual[i] * weight[i]);
            partial[piece * 3] += square + NAME(total)(sum[0]);
            partial[piece * 3 + 1] += solved + NAME(total)(sum[1]);
            partial[piece * 3 + 2] += before + NAME(total)(sum[2]);
        }
    }
    add_pieces(partial, 3);
    memcpy(sums, partial, 3 * sizeof(double));
    free(weights);
    return 0;
}

/* out = mean + d x + R z, or mean + sqrt(d) x + R z; x may be out itself. */
int NAME(lift)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const STORED *diag, int root, const STORED *x,
               const STORED *mean, const double *z, STORED *out, int threads) {
    REAL *weights = NAME(padded)(z, k, 1.0);
    if (weights == NULL) return 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t start = 0; start < dim; start += BLOCK) {
        REAL sum[BLOCK] __attribute__((aligned(BYTES)));
        const int n = WIDTH(dim, start);
        if (root)
            for (int i = 0; i < n; i++) {
                const REAL d = diag[start + i];
                sum[i] = (sizeof(REAL) == 4 ? sqrtf(d) : sqrt(d)) * x[start + i];
            }
        else
            for (int i = 0; i < n; i++) sum[i] = (REAL)diag[start + i] * x[start + i];
        if (mean != NULL)
            for (int i = 0; i < n; i++) sum[i] += mean[start + i];
        NAME(add_rows)(rows, ld, k, start, n, weights, sum);
        for (int i = 0; i < n; i++) out[start + i] = (STORED)sum[i];
    }
    free(weights);
    return 0;
}

/* Write `width` rows of A R' from i on, 2 * LANES columns: the sums stay in registers if width is a constant. */
static inline __attribute__((always_inline)) void NAME(rotate_tile)(const STORED *rows, ptrdiff_t ld, int k, const REAL *w,
                                                                    STORED *out, ptrdiff_t out_ld, const int width) {
    VEC sums[SIDE][2];
    memset(sums, 0, sizeof sums);
    for (int r = 0; r < k; r++, rows += ld) {
        const VEC left = LOAD(rows), right = LOAD(rows + LANES);
        for (int t = 0; t < width; t++) {
            sums[t][0] += left * w[t * k + r];
            sums[t][1] += right * w[t * k + r];
        }
        __builtin_prefetch(rows + BLOCK, 0, 2);
        __builtin_prefetch(rows + BLOCK + LANES, 0, 2);
    }
    for (int t = 0; t < width; t++)
        for (int side = 0; side < 2; side++)
            *(NAME(stored) *)(out + t * out_ld + side * LANES) = __builtin_convertvector(sums[t][side], NAME(stored));
}

/* out (m rows, `out_ld` apart) = A R', A of shape (m, k): SIDE rows of A in each walk over the root. */
int NAME(rotate)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const double *a, int m, STORED *out,
                 ptrdiff_t out_ld, int threads) {
    REAL *weights = malloc((size_t)m * k * sizeof(REAL));
    if (weights == NULL) return 1;
    for (size_t i = 0; i < (size_t)m * k; i++) weights[i] = (REAL)a[i];
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t start = 0; start < dim; start += BLOCK) {
        const int n = WIDTH(dim, start), whole = n / (2 * LANES) * (2 * LANES);
        for (int j = 0; j < m; j += SIDE) {
            const REAL *w = weights + (size_t)j * k;
            const int width = m - j < SIDE ? m - j : SIDE;
            for (int i = 0; i < whole; i += 2 * LANES) {
                const STORED *from = rows + start + i;
                STORED *to = out + j * out_ld + start + i;
                switch (width) {
                case 1: NAME(rotate_tile)(from, ld, k, w, to, out_ld, 1); break;
                case 2: NAME(rotate_tile)(from, ld, k, w, to, out_ld, 2); break;
                case 3: NAME(rotate_tile)(from, ld, k, w, to, out_ld, 3); break;
                case 4: NAME(rotate_tile)(from, ld, k, w, to, out_ld, 4); break;
                case 5: NAME(rotate_tile)(from, ld, k, w, to, out_ld, 5); break;
                default: NAME(rotate_tile)(from, ld, k, w, to, out_ld, SIDE);
                }
            }
            for (int t = 0; t < width; t++)
                for (int i = whole; i < n; i++) {
                    REAL sum = 0;
                    for (int r = 0; r < k; r++) sum += w[t * k + r] * rows[r * ld + start + i];
                    out[(j + t) * out_ld + start + i] = (STORED)sum;
                }
        }
    }
    free(weights);
    return 0;
}

/* out (k rows, `count` apart) = the columns of the rows at `index`; a block of consecutive ones is copied whole. */
int NAME(gather)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const int64_t *index, ptrdiff_t count,
                 STORED *out, int threads) {
    (void)dim;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t start = 0; start < count; start += BLOCK) {
        const int n = WIDTH(count, start);
        const int64_t *at = index + start, first = at[0];
        int breaks = 0;
        for (int i = 0; i < n; i++) breaks += at[i] != first + i;
        for (int r = 0; r < k; r++) {
            const STORED *from = rows + r * ld;
            STORED *to = out + r * count + start;
            if (breaks == 0)
                memcpy(to, from + first, n * sizeof(STORED));
            else
                for (int i = 0; i < n; i++) to[i] = from[at[i]];
        }
    }
    return 0;
}

/* out = d + factor rowsum(R * R). */
int NAME(diagonal)(const STORED *rows, ptrdiff_t ld, int k, ptrdiff_t dim, const STORED *diag, double factor,
                   STORED *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t start = 0; start < dim; start += BLOCK) {
        REAL sum[BLOCK] __attribute__((aligned(BYTES)));
        const int n = WIDTH(dim, start);
        memset(sum, 0, sizeof sum);
        for (int r = 0; r < k; r++) {
            const STORED *row = rows + r * ld + start;
            for (int i = 0; i < n; i++) sum[i] += (REAL)row[i] * row[i];
            for (int i = 0; i < BLOCK; i += BYTES / (int)sizeof(STORED)) __builtin_prefetch(row + i + BLOCK, 0, 2);
        }
        for (int i = 0; i < n; i++) out[start + i] = (STORED)(diag[start + i] + (REAL)factor * sum[i]);
    }
    return 0;
}

/* sums (3) = the sum of log d over positive entries, the number of zeros, the number of negative or non-finite ones.
   Mantissas are multiplied and exponents added: one logarithm serves 128 entries. */
int NAME(scan)(ptrdiff_t dim, const STORED *diag, double *sums, int threads) {
    double partial[PIECES * 3] = {0};
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int piece = 0; piece < PIECES; piece++) {
        FOR_BLOCKS(piece, dim, block) {
            const ptrdiff_t start = block * BLOCK;
            const int n = WIDTH(dim, start);
            double values[BLOCK] __attribute__((aligned(BYTES)));
            int zeros = 0, bad = 0;
            for (int i = 0; i < n; i++) {
                const STORED d = diag[start + i];
                zeros += d == 0;
                bad += !(d >= 0 && d <= LARGEST);
                values[i] = d > 0 && d <= LARGEST ? d : 1;
            }
            for (int i = n; i < BLOCK; i++) values[i] = 1;
            wide mantissa = {1, 1, 1, 1, 1, 1, 1, 1};
            whole exponent = {0};
            for (int i = 0; i < BLOCK; i += WAYS) {
                wide v = *(wide *)(values + i);
                if (sizeof(STORED) == sizeof(double)) { /* a subnormal number has no leading bit: make it a normal one */
                    const whole tiny = v < DBL_MIN;
                    v *= (wide)((tiny & RAISED) | (~tiny & ONE));
                    exponent -= tiny & 100;
                }
                exponent += ((whole)v >> 52) - 1023;
                mantissa *= (wide)(((whole)v & MANTISSA) | ONE);
            }
            double sum = 0;
            for (int w = 0; w < WAYS; w++) sum += log(mantissa[w]) + (double)exponent[w] * 0.69314718055994530942;
            partial[piece * 3] += sum;
            partial[piece * 3 + 1] += zeros;
            partial[piece * 3 + 2] += bad;
        }
    }
    add_pieces(partial, 3);
    memcpy(sums, partial, 3 * sizeof(double));
    return 0;
}

/* One step of Welford's moments; deviation = x - the new mean unless NULL. `first` sets the shift to x. */
int NAME(collect)(ptrdiff_t dim, const STORED *x, STORED *shift, STORED *offset, STORED *sum_sq, STORED *deviation,
                  double count, double prior, int first, int threads) {
    const REAL share = (REAL)(1 / count), square = (REAL)((count - 1) / count), of_mean = (REAL)(count / (count + prior));
#pragma omp parallel for schedule(static) num_threads(threads)
    for (ptrdiff_t start = 0; start < dim; start += BLOCK) {
        const int n = WIDTH(dim, start);
        const STORED *from = x + start;
        STORED *restrict mean = offset + start, *restrict squares = sum_sq + start, *restrict base = shift + start;
        if (first) memcpy(base, from, n * sizeof(STORED));
        if (deviation == NULL) {
            for (int i = 0; i < n; i++) {
                const REAL delta = (REAL)from[i] - base[i] - mean[i];
                mean[i] += delta * share;
                squares[i] += delta * delta * square;
            }
        } else {
            STORED *restrict row = deviation + start;
            for (int i = 0; i < n; i++) {
                const REAL shifted = (REAL)from[i] - base[i], delta = shifted - mean[i], moved = mean[i] + delta * share;
                mean[i] = moved;
                squares[i] += delta * delta * square;
                row[i] = shifted - moved * of_mean;
            }
        }
    }
    return 0;
}

#undef VEC
#undef LOAD
