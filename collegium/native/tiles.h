/* The arithmetic, once per instruction set: kernels.c includes this file with LANES, ROWS, SUFFIX and TARGET set.
 *
 * A weight [O, K] is packed in panels of WIDTH = 2 * LANES outputs; a panel holds, for each k in turn, its WIDTH weights.
 * In float32 they lie in order. In bfloat16 word j of LANES 32-bit words holds output j below and output j + LANES above,
 * so that a shift and a mask turn one load into two vectors of float32. Missing outputs of the last panel are zeros.
 *
 * Every output is one chain of multiply-adds over k, in order, whatever the number of rows: a row's result never depends
 * on the rows beside it.
 */

#define CAT_(a, b) a##b
#define CAT(a, b) CAT_(a, b)
#define NAME(x) CAT(x, SUFFIX)
#define WIDTH (2 * LANES)

typedef float NAME(vf) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t NAME(vi) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t NAME(vu) __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define VF NAME(vf)
#define VI NAME(vi)
#define VU NAME(vu)

/* acc[2 * r], acc[2 * r + 1] = the panel's WIDTH outputs of row r, for `mr` rows; mr is a constant where it is called */
TARGET static inline __attribute__((always_inline)) void NAME(tile)(
    const int mr, const int is_bf16, const float *const *rows, const void *panel, int64_t K, VF *acc)
{
    const float *p[ROWS];
    VF a[ROWS][2];
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
        p[r] = rows[r];
        a[r][0] = (VF){0};
        a[r][1] = (VF){0};
    }
    const char *w = panel;
    for (int64_t k = 0; k < K; k++) {
        VF w0, w1;
        if (is_bf16) {
            VU both = *(const VU *)w;
            w0 = (VF)(both << 16);
            w1 = (VF)(both & 0xffff0000u);
            __builtin_prefetch(w + AHEAD);
            w += 2 * WIDTH;
        } else {
            w0 = *(const VF *)w;
            w1 = *(const VF *)(w + 4 * LANES);
            __builtin_prefetch(w + AHEAD);
            w += 4 * WIDTH;
        }
#pragma GCC unroll 16
        for (int r = 0; r < mr; r++) {
            VF x = p[r][k] - (VF){0};
            a[r][0] += x * w0;
            a[r][1] += x * w1;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < mr; r++) {
        acc[2 * r] = a[r][0];
        acc[2 * r + 1] = a[r][1];
    }
}

#define CASE(n) \
    case n: \
        if (n <= ROWS) NAME(tile)(n, is_bf16, rows, panel, K, acc); \
        break;

TARGET static inline __attribute__((always_inline)) void NAME(tiles)(
    int mr, const int is_bf16, const float *const *rows, const void *panel, int64_t K, VF *acc)
{
    switch (mr) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#if ROWS > 6
        CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#endif
    }
}

TARGET static void NAME(panel_f32)(int mr, const float *const *rows, const void *panel, int64_t K, VF *acc)
{
    NAME(tiles)(mr, 0, rows, panel, K, acc);
}

TARGET static void NAME(panel_bf16)(int mr, const float *const *rows, const void *panel, int64_t K, VF *acc)
{
    NAME(tiles)(mr, 1, rows, panel, K, acc);
}

TARGET static inline VF NAME(pick)(VI mask, VF yes, VF no)
{
    return (VF)((mask & (VI)yes) | (~mask & (VI)no));
}

/* e^x to about one unit in the last place: 2^n * p(r), x = n ln 2 + r */
TARGET static inline VF NAME(exp)(VF x)
{
    const VF low = (VF){0} - 87.33654f, high = (VF){0} + 88.37626f;
    x = NAME(pick)(x < low, low, x);
    x = NAME(pick)(x > high, high, x);
    VF n = x * 1.44269504f;
    VI whole = __builtin_convertvector(n + NAME(pick)(n < 0, (VF){0} - 0.5f, (VF){0} + 0.5f), VI);
    n = __builtin_convertvector(whole, VF);
    VF r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    VF y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * (VF)((whole + 127) << 23);
}

TARGET static inline VF NAME(act)(int activation, VF gate, VF up, float clamp, float alpha)
{
    switch (activation) {
    case SILU:
        return gate / (1.0f + NAME(exp)(-gate)) * up;
    case RELU:
        return NAME(pick)(gate < 0, (VF){0}, gate) * up;
    case GELU: {
        VF out;
        for (int i = 0; i < LANES; i++)
            out[i] = 0.5f * gate[i] * (1.0f + erff(gate[i] * 0.70710678f)) * up[i];
        return out;
    }
    case GELU_TANH: {
        VF inner = 0.79788456f * (gate + 0.044715f * gate * gate * gate);
        return gate * (1.0f - 1.0f / (1.0f + NAME(exp)(2.0f * inner))) * up;
    }
    default: { /* CLAMPED_SWIGLU */
        VF most = (VF){0} + clamp;
        gate = NAME(pick)(gate > most, most, gate);
        up = NAME(pick)(up > most, most, up);
        up = NAME(pick)(up < -most, -most, up);
        return (up + 1.0f) * (gate / (1.0f + NAME(exp)(-gate * alpha)));
    }
    }
}

TARGET static inline void NAME(store)(void *out, int is_bf16, int64_t at, int64_t room, VF lo, VF hi)
{
    if (!is_bf16 && room >= WIDTH) {
        *(VF *)((float *)out + at) = lo;
        *(VF *)((float *)out + at + LANES) = hi;
        return;
    }
    for (int i = 0; i < WIDTH && i < room; i++) {
        float value = i < LANES ? lo[i] : hi[i - LANES];
        if (is_bf16)
            ((uint16_t *)out)[at + i] = to_bf16(value);
        else
            ((float *)out)[at + i] = value;
    }
}

TARGET static inline VF NAME(bias)(const void *bias, int is_bf16, int64_t at, int64_t size)
{
    VF out = {0};
    for (int i = 0; i < LANES && at + i < size; i++)
        out[i] = is_bf16 ? from_bf16(((const uint16_t *)bias)[at + i]) : ((const float *)bias)[at + i];
    return out;
}

/* Into how many rows the next block of `left` goes: blocks of about the same size, none above ROWS. */
static inline int NAME(block)(int64_t left)
{
    int64_t blocks = (left + ROWS - 1) / ROWS;
    return (int)((left + blocks - 1) / blocks);
}

/* Panels [begin, end) of out [R, O] = rows [R, K] @ weight.T + bias */
TARGET static void NAME(linear)(const struct linear *job, int64_t begin, int64_t end)
{
    int64_t panel_bytes = job->K * WIDTH * (job->is_bf16 ? 2 : 4);
    VF acc[2 * ROWS];
    for (int64_t n = begin; n < end; n++) {
        const char *panel = (const char *)job->weight + n * panel_bytes;
        VF b0 = {0}, b1 = {0};
        if (job->bias) {
            b0 = NAME(bias)(job->bias, job->is_bf16, n * WIDTH, job->O);
            b1 = NAME(bias)(job->bias, job->is_bf16, n * WIDTH + LANES, job->O);
        }
        for (int64_t r = 0; r < job->R;) {
            int mr = NAME(block)(job->R - r);
            const float *rows[ROWS];
            for (int i = 0; i < mr; i++)
                rows[i] = job->x + (r + i) * job->x_stride;
            (job->is_bf16 ? NAME(panel_bf16) : NAME(panel_f32))(mr, rows, panel, job->K, acc);
            for (int i = 0; i < mr; i++)
                NAME(store)(job->out, job->is_out_bf16, (r + i) * job->out_stride + n * WIDTH, job->O - n * WIDTH,
                            acc[2 * i] + b0, acc[2 * i + 1] + b1);
            r += mr;
        }
    }
}

/* Panels [begin, end) of the hidden rows of group g: act(x @ gate.T, x @ up.T), or without an up, which is 1 then */
TARGET static void NAME(gate_up)(const struct experts *job, int64_t g, int64_t begin, int64_t end)
{
    const struct expert_shape *s = job->shape;
    int64_t panel_bytes = s->D * WIDTH * (s->is_bf16 ? 2 : 4);
    const char *gate = job->weights[g];
    const char *up = gate + s->up_at;
    int64_t first = job->starts[g], last = first + job->counts[g];
    VF acc_g[2 * ROWS], acc_u[2 * ROWS];
    for (int64_t n = begin; n < end; n++) {
        VF bg0 = {0}, bg1 = {0}, bu0 = {0}, bu1 = {0};
        if (s->has_bias) {
            const char *bias = gate + s->gate_up_bias_at;
            bg0 = NAME(bias)(bias, s->is_bf16, n * WIDTH, s->F);
            bg1 = NAME(bias)(bias, s->is_bf16, n * WIDTH + LANES, s->F);
            bias += s->F * (s->is_bf16 ? 2 : 4);
            if (s->is_gated) {
                bu0 = NAME(bias)(bias, s->is_bf16, n * WIDTH, s->F);
                bu1 = NAME(bias)(bias, s->is_bf16, n * WIDTH + LANES, s->F);
            }
        }
        for (int64_t p = first; p < last;) {
            int mr = NAME(block)(last - p);
            const float *rows[ROWS];
            for (int i = 0; i < mr; i++)
                rows[i] = job->x + job->pair_rows[p + i] * s->D;
            (s->is_bf16 ? NAME(panel_bf16) : NAME(panel_f32))(mr, rows, gate + n * panel_bytes, s->D, acc_g);
            if (s->is_gated)
                (s->is_bf16 ? NAME(panel_bf16) : NAME(panel_f32))(mr, rows, up + n * panel_bytes, s->D, acc_u);
            else
                for (int i = 0; i < 2 * mr; i++)
                    acc_u[i] = (VF){0} + 1.0f;
            for (int i = 0; i < mr; i++) {
                VF h0 = NAME(act)(s->activation, acc_g[2 * i] + bg0, acc_u[2 * i] + bu0, s->clamp, s->alpha);
                VF h1 = NAME(act)(s->activation, acc_g[2 * i + 1] + bg1, acc_u[2 * i + 1] + bu1, s->clamp, s->alpha);
                NAME(store)(job->hidden, 0, (p + i) * s->F + n * WIDTH, s->F - n * WIDTH, h0, h1);
            }
            p += mr;
        }
    }
}

/* Panels [begin, end) of y for the pairs of group g: hidden @ down.T */
TARGET static void NAME(down)(const struct experts *job, int64_t g, int64_t begin, int64_t end)
{
    const struct expert_shape *s = job->shape;
    int64_t panel_bytes = s->F * WIDTH * (s->is_bf16 ? 2 : 4);
    const char *down = (const char *)job->weights[g] + s->down_at;
    int64_t first = job->starts[g], last = first + job->counts[g];
    VF acc[2 * ROWS];
    for (int64_t n = begin; n < end; n++) {
        VF b0 = {0}, b1 = {0};
        if (s->has_bias) {
            const char *bias = (const char *)job->weights[g] + s->down_bias_at;
            b0 = NAME(bias)(bias, s->is_bf16, n * WIDTH, s->D);
            b1 = NAME(bias)(bias, s->is_bf16, n * WIDTH + LANES, s->D);
        }
        for (int64_t p = first; p < last;) {
            int mr = NAME(block)(last - p);
            const float *rows[ROWS];
            for (int i = 0; i < mr; i++)
                rows[i] = job->hidden + (p + i) * s->F;
            (s->is_bf16 ? NAME(panel_bf16) : NAME(panel_f32))(mr, rows, down + n * panel_bytes, s->F, acc);
            for (int i = 0; i < mr; i++)
                NAME(store)(job->y, 0, (p + i) * s->D + n * WIDTH, s->D - n * WIDTH, acc[2 * i] + b0, acc[2 * i + 1] + b1);
            p += mr;
        }
    }
}

TARGET static void NAME(pack)(void *to, const void *from, int64_t O, int64_t K, int is_bf16)
{
    static const uint32_t zeros[16]; /* stands for 16 or 32 weights of an output that does not exist */
    int64_t block = is_bf16 ? 32 : 16; /* a cache line of each output at a time */
    for (int64_t n = 0; n < (O + WIDTH - 1) / WIDTH; n++)
        for (int64_t k0 = 0; k0 < K; k0 += block) {
            int64_t num = K - k0 < block ? K - k0 : block;
            const void *lines[WIDTH];
            for (int i = 0; i < WIDTH; i++)
                lines[i] = n * WIDTH + i >= O ? (const void *)zeros
                                              : (const char *)from + ((n * WIDTH + i) * K + k0) * (is_bf16 ? 2 : 4);
            uint32_t *out = (uint32_t *)to + (n * K + k0) * (is_bf16 ? LANES : WIDTH);
            if (is_bf16)
                for (int64_t k = 0; k < num; k++)
                    for (int j = 0; j < LANES; j++)
                        *out++ = ((const uint16_t *)lines[j])[k] | (uint32_t)((const uint16_t *)lines[j + LANES])[k] << 16;
            else
                for (int64_t k = 0; k < num; k++)
                    for (int j = 0; j < WIDTH; j++)
                        *out++ = ((const uint32_t *)lines[j])[k];
        }
}

/* --- attention --- */

TARGET static inline float NAME(total)(VF v)
{
#pragma GCC unroll 4
    for (int step = LANES / 2; step; step /= 2) {
#ifdef __clang__
        VF moved;
        for (int j = 0; j < LANES; j++)
            moved[j] = v[j ^ step];
        v += moved;
#else
        VI other;
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++)
            other[j] = j ^ step;
        v += __builtin_shuffle(v, other);
#endif
    }
    return v[0];
}

TARGET static void NAME(norm)(float *out, const float *x, const float *weight, int64_t n, float eps)
{
    typedef double wide __attribute__((vector_size(8 * LANES)));
    wide sums = {0};
    double sum = 0;
    for (int64_t i = 0; i + LANES <= n; i += LANES) {
        wide v = __builtin_convertvector(*(const VF *)(x + i), wide);
        sums += v * v;
    }
    for (int j = 0; j < LANES; j++)
        sum += sums[j];
    for (int64_t i = n - n % LANES; i < n; i++)
        sum += x[i] * x[i];
    float scale = (float)(1.0 / sqrt(sum / (double)n + eps));
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

TARGET static void NAME(centre)(float *out, const float *x, const float *weight, const float *bias, int64_t n, float eps)
{
    typedef double wide __attribute__((vector_size(8 * LANES)));
    wide sums = {0}, squares = {0};
    double sum = 0, square = 0;
    for (int64_t i = 0; i + LANES <= n; i += LANES)
        sums += __builtin_convertvector(*(const VF *)(x + i), wide);
    for (int j = 0; j < LANES; j++)
        sum += sums[j];
    for (int64_t i = n - n % LANES; i < n; i++)
        sum += x[i];
    double mean = sum / (double)n;
    for (int64_t i = 0; i + LANES <= n; i += LANES) {
        wide v = __builtin_convertvector(*(const VF *)(x + i), wide) - mean;
        squares += v * v;
    }
    for (int j = 0; j < LANES; j++)
        square += squares[j];
    for (int64_t i = n - n % LANES; i < n; i++)
        square += (x[i] - mean) * (x[i] - mean);
    float scale = (float)(1.0 / sqrt(square / (double)n + eps)), middle = (float)mean;
    for (int64_t i = 0; i < n; i++)
        out[i] = (x[i] - middle) * scale * weight[i] + (bias ? bias[i] : 0);
}

/* x [W] = x * cos + (-upper half, lower half) * sin */
TARGET static void NAME(rotate)(float *x, const float *cos, const float *sin, int64_t W)
{
    int64_t half = W / 2;
    for (int64_t i = 0; i < half; i++) {
        float low = x[i], high = x[i + half];
        x[i] = low * cos[i] - high * sin[i];
        x[i + half] = high * cos[i + half] + low * sin[i + half];
    }
}

TARGET static inline VF NAME(load)(const void *from, int64_t at, int is_bf16)
{
    typedef uint16_t half __attribute__((vector_size(2 * LANES), aligned(2), may_alias));
    if (is_bf16)
        return (VF)(__builtin_convertvector(*(const half *)((const uint16_t *)from + at), VU) << 16);
    return *(const VF *)((const float *)from + at);
}

TARGET static void NAME(narrow)(void *to, int64_t at, const float *from, int64_t n, int is_bf16)
{
    if (!is_bf16)
        memcpy((float *)to + at, from, n * sizeof(float));
    else
        for (int64_t i = 0; i < n; i++)
            ((uint16_t *)to)[at + i] = to_bf16(from[i]);
}

/* scores[p] += scaling * q . key[p], over `num` vectors of the head (a constant where it is called) */
TARGET static inline __attribute__((always_inline)) void NAME(score)(
    const int num, const int is_bf16, const float *q, const void *keys, const int64_t *at, int64_t n, float scaling,
    float *scores)
{
    VF mine[8];
#pragma GCC unroll 8
    for (int i = 0; i < num; i++)
        mine[i] = *(const VF *)(q + i * LANES);
    for (int64_t p = 0; p < n; p++) {
        VF even = {0}, odd = {0};
#pragma GCC unroll 8
        for (int i = 0; i < num; i++) {
            VF key = NAME(load)(keys, at[p] + i * LANES, is_bf16);
            if (i % 2)
                odd += mine[i] * key;
            else
                even += mine[i] * key;
        }
        scores[p] += scaling * NAME(total)(even + odd);
    }
}

/* out = sum over p of scores[p] * value[p], `num` vectors of the head */
TARGET static inline __attribute__((always_inline)) void NAME(mix)(
    const int num, const int is_bf16, const float *scores, const void *values, const int64_t *at, int64_t n, float *out)
{
    VF sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < num; i++)
        sum[i] = (VF){0};
    for (int64_t p = 0; p < n; p++) {
        VF weight = scores[p] - (VF){0};
#pragma GCC unroll 8
        for (int i = 0; i < num; i++)
            sum[i] += weight * NAME(load)(values, at[p] + i * LANES, is_bf16);
    }
#pragma GCC unroll 8
    for (int i = 0; i < num; i++)
        *(VF *)(out + i * LANES) = sum[i];
}

/* scores = softmax(scores), beside a sink that takes its share where there is one */
TARGET static void NAME(soften)(float *scores, int64_t n, const float *sink)
{
    float most = sink ? *sink : scores[0];
    for (int64_t i = 0; i < n; i++)
        most = scores[i] > most ? scores[i] : most;
    double total = sink ? exp((double)*sink - most) : 0;
    for (int64_t i = 0; i < n; i += LANES) {
        VF v = {0};
        int64_t left = n - i < LANES ? n - i : LANES;
        memcpy(&v, scores + i, left * sizeof(float));
        v = NAME(exp)(v - most);
        memcpy(scores + i, &v, left * sizeof(float));
        for (int j = 0; j < left; j++)
            total += v[j];
    }
    float scale = (float)(1.0 / total);
    for (int64_t i = 0; i < n; i++)
        scores[i] *= scale;
}

TARGET static inline __attribute__((always_inline)) float NAME(one)(const void *from, int64_t at, const int is_bf16)
{
    return is_bf16 ? from_bf16(((const uint16_t *)from)[at]) : ((const float *)from)[at];
}

/* scores[p] += scaling * q . key[p], of W numbers each */
TARGET static inline __attribute__((always_inline)) void NAME(score_all)(
    const int is_bf16, const float *q, const void *keys, const int64_t *at, int64_t n, int64_t W, float scaling, float *scores)
{
    int64_t w = 0;
    for (int64_t num; W - w >= LANES; w += num * LANES) { /* from w on: moving the pool moves every position */
        const char *from = (const char *)keys + w * (is_bf16 ? 2 : 4);
        num = (W - w) / LANES >= 8 ? 8 : (W - w) / LANES >= 4 ? 4 : (W - w) / LANES >= 2 ? 2 : 1;
        switch (num) {
        case 8: NAME(score)(8, is_bf16, q + w, from, at, n, scaling, scores); break;
        case 4: NAME(score)(4, is_bf16, q + w, from, at, n, scaling, scores); break;
        case 2: NAME(score)(2, is_bf16, q + w, from, at, n, scaling, scores); break;
        default: NAME(score)(1, is_bf16, q + w, from, at, n, scaling, scores);
        }
    }
    for (; w < W; w++) /* what is left of a width that is no multiple of a vector's */
        for (int64_t p = 0; p < n; p++)
            scores[p] += scaling * q[w] * NAME(one)(keys, at[p] + w, is_bf16);
}

/* out [W] = sum over p of scores[p] * value[p] */
TARGET static inline __attribute__((always_inline)) void NAME(mix_all)(
    const int is_bf16, const float *scores, const void *values, const int64_t *at, int64_t n, int64_t W, float *out)
{
    int64_t w = 0;
    for (int64_t num; W - w >= LANES; w += num * LANES) {
        const char *from = (const char *)values + w * (is_bf16 ? 2 : 4);
        num = (W - w) / LANES >= 8 ? 8 : (W - w) / LANES >= 4 ? 4 : (W - w) / LANES >= 2 ? 2 : 1;
        switch (num) {
        case 8: NAME(mix)(8, is_bf16, scores, from, at, n, out + w); break;
        case 4: NAME(mix)(4, is_bf16, scores, from, at, n, out + w); break;
        case 2: NAME(mix)(2, is_bf16, scores, from, at, n, out + w); break;
        default: NAME(mix)(1, is_bf16, scores, from, at, n, out + w);
        }
    }
    for (; w < W; w++) {
        out[w] = 0;
        for (int64_t p = 0; p < n; p++)
            out[w] += scores[p] * NAME(one)(values, at[p] + w, is_bf16);
    }
}

/* One decoding row and a part of its heads, of looking_parts: they look at their positions. scratch: 3 floats a position, 5 where
 * keys are latent */
TARGET static inline __attribute__((always_inline)) void NAME(look)(
    const struct attend *job, const int is_bf16, int64_t row, int64_t part, float *scratch)
{
    const struct attention *a = job->attention;
    int64_t W = a->W, share = a->H / looking_parts(a), width = W + a->rotary;
    int64_t end = job->lengths[row], begin = a->window && end > a->window ? end - a->window : 0, n = end - begin;
    const int64_t *blocks = job->blocks + job->first_block[row];
    int64_t *at = (int64_t *)scratch, *rotated_at = at + job->longest;
    float *scores = (float *)(a->rotary ? rotated_at + job->longest : rotated_at);
    for (int64_t p = begin; p < end; p++) {
        int64_t slot = blocks[p / a->block_tokens] * a->block_tokens + p % a->block_tokens;
        if (a->rotary) {
            at[p - begin] = slot * W;
            rotated_at[p - begin] = slot * a->rotary;
        } else
            at[p - begin] = (slot * a->G + part) * W;
    }
    for (int64_t head = part * share; head < (part + 1) * share; head++) {
        const float *q = job->q + (row * a->H + head) * width;
        memset(scores, 0, n * sizeof(float));
        NAME(score_all)(is_bf16, q, a->keys, at, n, W, a->scaling, scores);
        if (a->rotary)
            NAME(score_all)(is_bf16, q + W, a->values, rotated_at, n, a->rotary, a->scaling, scores);
        if (a->by_distance) {
            const float *bias = a->by_distance + head * a->num_distances;
            for (int64_t i = 0; i < n; i++)
                scores[i] += bias[n - 1 - i < a->num_distances ? n - 1 - i : a->num_distances - 1];
        }
        NAME(soften)(scores, n, a->sinks ? a->sinks + head : NULL);
        NAME(mix_all)(is_bf16, scores, a->rotary ? a->keys : a->values, at, n, W, job->out + (row * a->H + head) * W);
    }
}

TARGET static void NAME(attend)(const struct attend *job, int64_t row, int64_t part, float *scratch)
{
    if (job->attention->is_bf16)
        NAME(look)(job, 1, row, part, scratch);
    else
        NAME(look)(job, 0, row, part, scratch);
}

#define AROUND (LANES == 16 ? 8 : 4) /* rows at once, of MOST_AROUND */

/* AROUND rows of a source, of one head, look at all of it. q: where each row's W numbers are; keys [W, padded] turned, scores
 * [AROUND, padded] */
TARGET static inline __attribute__((always_inline)) void NAME(score_around)(
    const int num, const float *const *q, const float *keys, int64_t W, int64_t padded, float scaling, float *scores)
{
    VF sums[AROUND][2];
#pragma GCC unroll 8
    for (int r = 0; r < AROUND; r++)
        for (int i = 0; i < num; i++)
            sums[r][i] = (VF){0};
    for (int64_t w = 0; w < W; w++) {
        VF key[2];
        for (int i = 0; i < num; i++)
            key[i] = *(const VF *)(keys + w * padded + i * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < AROUND; r++) {
            VF mine = q[r][w] - (VF){0};
            for (int i = 0; i < num; i++)
                sums[r][i] += mine * key[i];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < AROUND; r++)
        for (int i = 0; i < num; i++)
            *(VF *)(scores + r * padded + i * LANES) = sums[r][i] * scaling;
}

/* out [AROUND, stride], `num` vectors = sum over p of scores[r][p] * values[p] */
TARGET static inline __attribute__((always_inline)) void NAME(mix_around)(
    const int num, const float *scores, const float *values, int64_t n, int64_t padded, int64_t stride, float *out)
{
    VF sums[AROUND][2];
#pragma GCC unroll 8
    for (int r = 0; r < AROUND; r++)
        for (int i = 0; i < num; i++)
            sums[r][i] = (VF){0};
    for (int64_t p = 0; p < n; p++) {
        VF value[2];
        for (int i = 0; i < num; i++)
            value[i] = *(const VF *)(values + p * stride + i * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < AROUND; r++) {
            VF weight = scores[r * padded + p] - (VF){0};
            for (int i = 0; i < num; i++)
                sums[r][i] += weight * value[i];
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < AROUND; r++)
        for (int i = 0; i < num; i++)
            *(VF *)(out + r * stride + i * LANES) = sums[r][i];
}

/* scores [padded] of n positions become weights; what they are to be divided by is returned. */
TARGET static float NAME(soften_around)(float *scores, int64_t n, int64_t padded)
{
    for (int64_t p = n; p < padded; p++)
        scores[p] = -INFINITY;
    VF most = *(VF *)scores, total = {0};
    for (int64_t p = LANES; p < padded; p += LANES) {
        VF v = *(VF *)(scores + p);
        VI more = v > most;
        most = (VF)(((VI)v & more) | ((VI)most & ~more));
    }
    float highest = most[0];
    for (int i = 1; i < LANES; i++)
        highest = most[i] > highest ? most[i] : highest;
    for (int64_t p = 0; p < padded; p += LANES) {
        VF v = NAME(exp)(*(VF *)(scores + p) - highest);
        *(VF *)(scores + p) = v;
    }
    for (int64_t p = n; p < padded; p++)
        scores[p] = 0;
    for (int64_t p = 0; p < padded; p += LANES)
        total += *(VF *)(scores + p);
    return NAME(total)(total);
}

/* Rows `first` to `last` of a source, of one head, look at all of it. scratch: for the keys [W, padded], the values
 * [n, stride], and scores and results of AROUND rows. What a row comes to depends on its source alone. */
TARGET static void NAME(look_around)(const struct around *job, int64_t source, int64_t head, int64_t first, int64_t last,
                                     float *scratch)
{
    const struct attention *a = job->attention;
    int64_t H = a->H, W = a->W, n = job->lengths[source], begin = job->begins[source];
    int64_t padded = (n + MOST_LANES - 1) / MOST_LANES * MOST_LANES, stride = (W + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    float *keys = scratch, *values = keys + W * padded, *scores = values + n * stride, *out = scores + AROUND * padded;
    memset(scratch, 0, (W * padded + n * stride) * sizeof(float));
    for (int64_t p = 0; p < n; p++)
        for (int64_t w = 0, at = ((begin + p) * H + head) * W; w < W; w++) {
            keys[w * padded + p] = NAME(one)(a->keys, at + w, a->is_bf16);
            values[p * stride + w] = NAME(one)(a->values, at + w, a->is_bf16);
        }
    const float *bias = job->by_distance ? job->by_distance + head * (2 * job->farthest + 1) + job->farthest : NULL;
    for (int64_t row = first; row < last; row += AROUND) {
        const float *q[AROUND];
        int64_t num = last - row < AROUND ? last - row : AROUND;
        for (int64_t r = 0; r < AROUND; r++) /* those that are missing are the first one again */
            q[r] = job->q + ((begin + row + (r < num ? r : 0)) * H + head) * W;
        int64_t p = 0;
        for (; p + 2 * LANES <= padded; p += 2 * LANES)
            NAME(score_around)(2, q, keys + p, W, padded, a->scaling, scores + p);
        for (; p < padded; p += LANES)
            NAME(score_around)(1, q, keys + p, W, padded, a->scaling, scores + p);
        float divisors[AROUND];
        for (int64_t r = 0; r < AROUND; r++) {
            if (bias)
                for (int64_t at = 0; at < n; at++) {
                    int64_t distance = at - row - r, far = job->farthest;
                    scores[r * padded + at] += bias[distance < -far ? -far : distance > far ? far : distance];
                }
            divisors[r] = NAME(soften_around)(scores + r * padded, n, padded);
        }
        int64_t w = 0;
        for (; w + 2 * LANES <= stride; w += 2 * LANES)
            NAME(mix_around)(2, scores, values + w, n, padded, stride, out + w);
        for (; w < stride; w += LANES)
            NAME(mix_around)(1, scores, values + w, n, padded, stride, out + w);
        for (int64_t r = 0; r < num; r++)
            for (int64_t i = 0, at = ((begin + row + r) * H + head) * W; i < W; i++)
                job->out[at + i] = out[r * stride + i] / divisors[r];
    }
}

/* Multiply-adds without memory: returns how many floating-point operations were done. */
TARGET static double NAME(peak)(int64_t rounds)
{
    VF sums[12], x = (VF){0} + 1e-3f, y = (VF){0} + 0.5f;
    for (int i = 0; i < 12; i++)
        sums[i] = (VF){0} + (float)i;
    for (int64_t r = 0; r < rounds; r++)
#pragma GCC unroll 12
        for (int i = 0; i < 12; i++)
            sums[i] = sums[i] * y + x;
    float total = 0;
    for (int i = 0; i < 12; i++)
        total += sums[i][0];
    return total > 1e30f ? 0 : (double)rounds * 12 * LANES * 2;
}

static const struct isa NAME(isa) = {WIDTH,        1,            NAME(linear), NAME(gate_up), NAME(down), NAME(pack), NAME(norm),
                                     NAME(centre), NAME(rotate), NAME(narrow), NAME(attend),  NULL,       NULL,
                                     NAME(look_around), NAME(peak)};

#undef CAT_
#undef CAT
#undef NAME
#undef WIDTH
#undef VF
#undef VI
#undef VU
#undef CASE
#undef LANES
#undef AROUND
#undef ROWS
#undef SUFFIX
#undef TARGET
