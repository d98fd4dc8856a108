/* bfloat16 products on matrix units, AMX: kernels.c includes this after the AVX-512 instance of tiles.h, whose float32 and
 * everything that is no product it shares.
 *
 * A weight [O, K] is packed in panels of 32 outputs; a panel holds, for each 32 k in turn, two tiles of 16 outputs: 16 rows,
 * one for each pair of k, of 16 words with both weights of an output. Missing outputs and k are zeros. Rows are bfloat16
 * too and lie in tiles: 16 rows of 32 k, for each 32 k in turn, then the next 16 rows. Missing k are zeros; missing rows
 * anything.
 *
 * The unit sums a row's products of each 32 k by themselves, even and odd k apart, in float32: a row's result never depends on
 * the rows beside it, nor on their number. What lies between two products is rounded to bfloat16, as the modelling classes
 * of transformers do.
 */

#include <immintrin.h>

#define AMX_TARGET \
    __attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma" WIDTH_512))) WHOLE

enum { TILE_ROWS = 16, TILE_K = 32, TILE_OUTPUTS = 32, TILE_BYTES = 1024, TILES_AHEAD = 4096 };

/* Tiles 0 to 3 are sums, 4 and 5 rows, 6 and 7 weights. With fewer than 16 rows, those of sums and rows are so many. */
AMX_TARGET static inline void set_tiles(int64_t rows)
{
    struct {
        uint8_t palette, start, unused[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } tiles = {.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64}, .rows = {16, 16, 16, 16, 16, 16, 16, 16}};
    if (rows < TILE_ROWS)
        tiles.rows[0] = tiles.rows[1] = tiles.rows[4] = (uint8_t)rows;
    __asm__ volatile("" ::"m"(tiles)); /* the intrinsic says that it reads 8 bytes of it */
    _tile_loadconfig(&tiles);
}

/* What is read next of the weights, so that it is there when its time comes: `step` bytes of it at each block of a product. */
struct ahead {
    const char *at;
    int64_t step;
};

/* A panel is read once: the first rows find it in no cache. With more than one block of rows, the next panel is fetched
 * while all of them are computed; with one, what is a little further on. */
static inline struct ahead read_ahead(const char *panel, int64_t panel_bytes, int64_t blocks, int64_t r, int64_t R)
{
    int64_t num = (R + 2 * TILE_ROWS - 1) / (2 * TILE_ROWS), at = r / (2 * TILE_ROWS);
    if (num == 1)
        return (struct ahead){panel + TILES_AHEAD, 2 * TILE_BYTES};
    int64_t step = num < 32 ? 2 * TILE_BYTES / num / 64 * 64 : 64;
    return (struct ahead){panel + panel_bytes + at * blocks * step, at * blocks * step < panel_bytes ? step : 0};
}

/* What is still to be done with the rows of an earlier product: a row at each block of k of the next one, for the matrix unit
 * and the vector units work side by side. */
struct rest {
    int64_t i, num; /* the next row, and how many there are */
    const float *c, *up;
    __m512 bias[2], up_bias[2];
    int64_t room, first_row, stride; /* outputs that there are, from the first of the panel on */
    void *to;
    const void *job;
};

#define FOR_ONE_ROW AMX_TARGET static inline __attribute__((always_inline)) void

FOR_ONE_ROW nothing(struct rest *rest)
{
    (void)rest;
}

/* c [32, 32] float32, rows c_stride apart, = `rows` rows, at most 32, in the tiles at a, which are of `wide` blocks, times
 * `blocks` blocks of a panel */
AMX_TARGET static inline __attribute__((always_inline)) void amx_product(
    const uint16_t *a, int64_t wide, int64_t rows, const char *panel, int64_t blocks, float *c, int64_t c_stride,
    struct ahead ahead, void (*const aside)(struct rest *), struct rest *rest)
{
    int64_t c_bytes = c_stride * 4;
    _tile_zero(0);
    _tile_zero(1);
    if (rows > TILE_ROWS) {
        const uint16_t *below = a + wide * TILE_ROWS * TILE_K;
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t k = 0; k < blocks; k++, panel += 2 * TILE_BYTES, ahead.at += ahead.step) {
            for (int64_t line = 0; line < ahead.step; line += 64)
                __builtin_prefetch(ahead.at + line, 0, 2);
            _tile_loadd(4, a + k * TILE_ROWS * TILE_K, 64);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + TILE_BYTES, 64);
            _tile_loadd(5, below + k * TILE_ROWS * TILE_K, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
            if (rest->i < rest->num)
                aside(rest);
        }
        _tile_stored(2, c + TILE_ROWS * c_stride, c_bytes);
        _tile_stored(3, c + TILE_ROWS * c_stride + 16, c_bytes);
    } else
        for (int64_t k = 0; k < blocks; k++, panel += 2 * TILE_BYTES, ahead.at += ahead.step) {
            for (int64_t line = 0; line < ahead.step; line += 64)
                __builtin_prefetch(ahead.at + line);
            _tile_loadd(4, a + k * TILE_ROWS * TILE_K, 64);
            _tile_loadd(6, panel, 64);
            _tile_loadd(7, panel + TILE_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + 16, c_bytes);
}

AMX_TARGET static inline void amx_store(float *out, const float *c, int64_t room, __m512 b0, __m512 b1)
{
    __mmask16 low = room >= 16 ? 0xffff : (__mmask16)((1 << room) - 1);
    __mmask16 high = room >= 32 ? 0xffff : room > 16 ? (__mmask16)((1 << (room - 16)) - 1) : 0;
    _mm512_mask_storeu_ps(out, low, _mm512_loadu_ps(c) + b0);
    _mm512_mask_storeu_ps(out + 16, high, _mm512_loadu_ps(c + 16) + b1);
}

AMX_TARGET static inline void amx_store_narrow(uint16_t *out, int64_t room, __m512 v0, __m512 v1)
{
    __mmask16 low = room >= 16 ? 0xffff : (__mmask16)((1 << room) - 1);
    __mmask16 high = room >= 32 ? 0xffff : room > 16 ? (__mmask16)((1 << (room - 16)) - 1) : 0;
    _mm256_mask_storeu_epi16(out, low, (__m256i)_mm512_cvtneps_pbh(v0));
    _mm256_mask_storeu_epi16(out + 16, high, (__m256i)_mm512_cvtneps_pbh(v1));
}

/* Where row r begins in tiles of rows of so many blocks of 32 k; its next 32 k are a tile further. */
static inline uint16_t *in_tiles(uint16_t *tiles, int64_t r, int64_t blocks)
{
    return tiles + (r / TILE_ROWS * blocks * TILE_ROWS + r % TILE_ROWS) * TILE_K;
}

/* A row in tiles, from [K]. */
AMX_TARGET static void amx_narrow(uint16_t *to, const float *from, int64_t K)
{
    for (int64_t k = 0; k < K; k += TILE_K, to += TILE_ROWS * TILE_K)
        for (int64_t half = k; half < k + TILE_K; half += 16) {
            __mmask16 there = K - half >= 16 ? 0xffff : K > half ? (__mmask16)((1 << (K - half)) - 1) : 0;
            __m512 values = _mm512_maskz_loadu_ps(there, from + half);
            _mm256_storeu_si256((__m256i *)(to + half - k), (__m256i)_mm512_cvtneps_pbh(values));
        }
}

/* to, from number `at` on, = from [n], in bfloat16 or as it is */
AMX_TARGET static void narrow_amx(void *to, int64_t at, const float *from, int64_t n, int is_bf16)
{
    if (!is_bf16) {
        memcpy((float *)to + at, from, (size_t)n * sizeof(float));
        return;
    }
    uint16_t *out = (uint16_t *)to + at;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        _mm256_storeu_si256((__m256i *)(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    for (; i < n; i++)
        out[i] = to_bf16(from[i]);
}

/* The same where it is bfloat16 already. */
AMX_TARGET static void amx_copy(uint16_t *to, const uint16_t *from, int64_t K)
{
    for (int64_t k = 0; k < K; k += TILE_K, to += TILE_ROWS * TILE_K) {
        __mmask32 there = K - k >= 32 ? 0xffffffff : (1u << (K - k)) - 1;
        _mm512_storeu_si512(to, _mm512_maskz_loadu_epi16(there, from + k));
    }
}

/* 2^x to some 3e-6 of it, which is far less than what bfloat16 keeps; NaN stays NaN */
AMX_TARGET static inline __m512 amx_exp2(__m512 x)
{
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), f = x - n;
    __m512 y = f * 1.3333558e-3f + 9.6181291e-3f;
    y = y * f + 5.5504109e-2f;
    y = y * f + 2.4022651e-1f;
    y = y * f + 6.9314718e-1f;
    y = y * f + 1.0f;
    return _mm512_scalef_ps(y, n);
}

AMX_TARGET static inline __m512 amx_act(const struct expert_shape *s, __m512 gate, __m512 up)
{
    if (s->activation != SILU)
        return (__m512)act_avx512(s->activation, (vf_avx512)gate, (vf_avx512)up, s->clamp, s->alpha);
    __m512 low = _mm512_max_ps(_mm512_set1_ps(-80.0f), gate); /* of NaN: NaN */
    __m512 below = amx_exp2(low * -1.44269504f) + 1.0f, part = _mm512_rcp14_ps(below);
    part = part * (2.0f - below * part);
    return gate * up * part;
}

FOR_ONE_ROW store_linear(struct rest *rest)
{
    const struct linear *job = rest->job;
    int64_t i = rest->i++, at = (rest->first_row + i) * rest->stride;
    const float *c = rest->c + i * TILE_OUTPUTS;
    if (job->is_out_bf16)
        amx_store_narrow((uint16_t *)rest->to + at, rest->room, _mm512_load_ps(c) + rest->bias[0],
                         _mm512_load_ps(c + 16) + rest->bias[1]);
    else
        amx_store((float *)rest->to + at, c, rest->room, rest->bias[0], rest->bias[1]);
}

AMX_TARGET static void linear_amx(const struct linear *job, int64_t begin, int64_t end)
{
    if (!job->is_bf16) {
        linear_avx512(job, begin, end);
        return;
    }
    int64_t blocks = (job->K + TILE_K - 1) / TILE_K, panel_bytes = blocks * 2 * TILE_BYTES;
    float c[2][2 * TILE_ROWS * TILE_OUTPUTS] __attribute__((aligned(64)));
    struct rest rest = {.stride = job->out_stride, .job = job};
    int which = 0;
    set_tiles(job->R);
    for (int64_t n = begin; n < end; n++) {
        const char *panel = (const char *)job->weight + n * panel_bytes;
        int64_t at = n * TILE_OUTPUTS;
        __m512 bias[2] = {{0}, {0}};
        if (job->bias)
            for (int half = 0; half < 2; half++)
                bias[half] = (__m512)bias_avx512(job->bias, 1, at + 16 * half, job->O);
        for (int64_t r = 0; r < job->R; r += 2 * TILE_ROWS, which = !which) {
            int64_t num = job->R - r < 2 * TILE_ROWS ? job->R - r : 2 * TILE_ROWS;
            amx_product(job->narrow + r * blocks * TILE_K, blocks, num, panel, blocks, c[which], TILE_OUTPUTS,
                        read_ahead(panel, panel_bytes, blocks, r, job->R), store_linear, &rest);
            while (rest.i < rest.num)
                store_linear(&rest);
            rest.c = c[which];
            rest.bias[0] = bias[0];
            rest.bias[1] = bias[1];
            rest.to = (char *)job->out + at * (job->is_out_bf16 ? 2 : 4);
            rest.room = job->O - at;
            rest.first_row = r;
            rest.i = 0;
            rest.num = num;
        }
    }
    while (rest.i < rest.num)
        store_linear(&rest);
    _tile_release();
}

FOR_ONE_ROW store_hidden(struct rest *rest)
{
    const struct experts *job = rest->job;
    int64_t i = rest->i++;
    uint16_t *to = in_tiles(rest->to, rest->first_row + i, rest->stride);
    __m512 h[2];
    for (int half = 0; half < 2; half++) {
        int64_t from = i * TILE_OUTPUTS + 16 * half;
        __m512 up = _mm512_set1_ps(1.0f);
        if (rest->up)
            up = _mm512_load_ps(rest->up + from) + rest->up_bias[half];
        h[half] = amx_act(job->shape, _mm512_load_ps(rest->c + from) + rest->bias[half], up);
    }
    if (rest->room < TILE_OUTPUTS) /* what is past the last one is multiplied by zeros, and must be a number */
        memset(to, 0, 2 * TILE_OUTPUTS);
    amx_store_narrow(to, rest->room, h[0], h[1]);
}

AMX_TARGET static void gate_up_amx(const struct experts *job, int64_t g, int64_t begin, int64_t end)
{
    const struct expert_shape *s = job->shape;
    if (!s->is_bf16) {
        gate_up_avx512(job, g, begin, end);
        return;
    }
    int64_t blocks = (s->D + TILE_K - 1) / TILE_K, panel_bytes = blocks * 2 * TILE_BYTES, count = job->counts[g];
    int64_t hidden_blocks = (s->F + TILE_K - 1) / TILE_K;
    const char *gate = job->weights[g], *up = gate + s->up_at;
    const uint16_t *rows = job->narrow + job->places[g] * blocks * TILE_K;
    uint16_t *hidden = job->narrow_hidden + job->places[g] * hidden_blocks * TILE_K;
    float c[2][2][2 * TILE_ROWS * TILE_OUTPUTS] __attribute__((aligned(64)));
    struct rest rest = {.stride = hidden_blocks, .job = job};
    int which = 0;
    set_tiles(count);
    for (int64_t n = begin; n < end; n++) {
        int64_t at = n * TILE_OUTPUTS;
        const char *gates = gate + n * panel_bytes, *ups = up + n * panel_bytes;
        __m512 bg[2] = {{0}, {0}}, bu[2] = {{0}, {0}};
        if (s->has_bias)
            for (int half = 0; half < 2; half++) {
                const char *bias = gate + s->gate_up_bias_at;
                bg[half] = (__m512)bias_avx512(bias, 1, at + 16 * half, s->F);
                if (s->is_gated)
                    bu[half] = (__m512)bias_avx512(bias + 2 * s->F, 1, at + 16 * half, s->F);
            }
        for (int64_t r = 0; r < count; r += 2 * TILE_ROWS, which = !which) {
            int64_t num = count - r < 2 * TILE_ROWS ? count - r : 2 * TILE_ROWS;
            const uint16_t *these = rows + r * blocks * TILE_K;
            amx_product(these, blocks, num, gates, blocks, c[which][0], TILE_OUTPUTS,
                        read_ahead(gates, panel_bytes, blocks, r, count), store_hidden, &rest);
            if (s->is_gated)
                amx_product(these, blocks, num, ups, blocks, c[which][1], TILE_OUTPUTS,
                            read_ahead(ups, panel_bytes, blocks, r, count), store_hidden, &rest);
            while (rest.i < rest.num)
                store_hidden(&rest);
            rest.c = c[which][0];
            rest.up = s->is_gated ? c[which][1] : NULL;
            for (int half = 0; half < 2; half++) {
                rest.bias[half] = bg[half];
                rest.up_bias[half] = bu[half];
            }
            rest.to = hidden + n * TILE_ROWS * TILE_K;
            rest.room = s->F - at;
            rest.first_row = r;
            rest.i = 0;
            rest.num = num;
        }
    }
    while (rest.i < rest.num)
        store_hidden(&rest);
    _tile_release();
}

FOR_ONE_ROW store_down(struct rest *rest)
{
    int64_t i = rest->i++;
    amx_store((float *)rest->to + (rest->first_row + i) * rest->stride, rest->c + i * TILE_OUTPUTS, rest->room, rest->bias[0],
              rest->bias[1]);
}

AMX_TARGET static void down_amx(const struct experts *job, int64_t g, int64_t begin, int64_t end)
{
    const struct expert_shape *s = job->shape;
    if (!s->is_bf16) {
        down_avx512(job, g, begin, end);
        return;
    }
    int64_t blocks = (s->F + TILE_K - 1) / TILE_K, panel_bytes = blocks * 2 * TILE_BYTES, count = job->counts[g];
    const char *down = (const char *)job->weights[g] + s->down_at;
    const uint16_t *hidden = job->narrow_hidden + job->places[g] * blocks * TILE_K;
    float *y = job->y + job->starts[g] * s->D, c[2][2 * TILE_ROWS * TILE_OUTPUTS] __attribute__((aligned(64)));
    struct rest rest = {.stride = s->D, .job = job};
    int which = 0;
    set_tiles(count);
    for (int64_t n = begin; n < end; n++) {
        int64_t at = n * TILE_OUTPUTS;
        const char *panel = down + n * panel_bytes;
        __m512 bias[2] = {{0}, {0}};
        if (s->has_bias)
            for (int half = 0; half < 2; half++)
                bias[half] = (__m512)bias_avx512((const char *)job->weights[g] + s->down_bias_at, 1, at + 16 * half, s->D);
        for (int64_t r = 0; r < count; r += 2 * TILE_ROWS, which = !which) {
            int64_t num = count - r < 2 * TILE_ROWS ? count - r : 2 * TILE_ROWS;
            amx_product(hidden + r * blocks * TILE_K, blocks, num, panel, blocks, c[which], TILE_OUTPUTS,
                        read_ahead(panel, panel_bytes, blocks, r, count), store_down, &rest);
            while (rest.i < rest.num)
                store_down(&rest);
            rest.c = c[which];
            rest.bias[0] = bias[0];
            rest.bias[1] = bias[1];
            rest.to = y + at;
            rest.room = s->D - at;
            rest.first_row = r;
            rest.i = 0;
            rest.num = num;
        }
    }
    while (rest.i < rest.num)
        store_down(&rest);
    _tile_release();
}

/* Products of tiles without memory: returns how many floating-point operations were done. */
AMX_TARGET static double peak_amx(int64_t rounds)
{
    set_tiles(TILE_ROWS);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    _tile_zero(6);
    _tile_zero(7);
    for (int64_t r = 0; r < rounds; r++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return (double)rounds * 4 * 2 * TILE_ROWS * 16 * TILE_K;
}

static void pack_amx(void *to, const void *from, int64_t O, int64_t K, int is_bf16)
{
    if (!is_bf16) {
        pack_avx512(to, from, O, K, 0);
        return;
    }
    uint32_t *out = to;
    const uint16_t *weight = from;
    for (int64_t n = 0; n < O; n += TILE_OUTPUTS)
        for (int64_t k = 0; k < K; k += TILE_K)
            for (int64_t half = n; half < n + TILE_OUTPUTS; half += 16)
                for (int64_t pair = k; pair < k + TILE_K; pair += 2)
                    for (int64_t o = half; o < half + 16; o++) {
                        uint32_t low = o < O && pair < K ? weight[o * K + pair] : 0;
                        uint32_t high = o < O && pair + 1 < K ? weight[o * K + pair + 1] : 0;
                        *out++ = low | high << 16;
                    }
}

/* --- attention over prompts: a block of query rows at a time looks at blocks of positions, with a softmax that streams
 * (Milakov and Gimelshein, 2018; Dao et al., FlashAttention, 2022). Blocks of positions are counted from the sequence's first,
 * so that a row's result doesn't depend on how its prompt was cut. --- */

enum { LOOKED_AT = 128 }; /* positions of a block: a multiple of 32 */

/* Positions 32 * n to 32 * n + 31 of a head's keys and values, as panels: of keys an output is a position, of values a k. */
AMX_TARGET static void pack_positions(const struct prompt *job, int64_t g, int64_t n)
{
    int64_t K = job->key_width, V = job->value_width, at[2][32]; /* where positions' rows are, in the sequence and in the pool */
    uint32_t *key = (uint32_t *)(job->keys + (g * job->num_panels + n) * K * 64);
    for (int64_t p = 0; p < 32; p++) {
        at[0][p] = n * 32 + p < job->end ? n * 32 + p : -1;
        at[1][p] = at[0][p] < 0 ? -1 : job->slots[at[0][p]];
    }
    for (int64_t k = 0; k < K; k += TILE_K)
        for (int64_t half = 0; half < 32; half += 16)
            for (int64_t pair = k; pair < k + TILE_K; pair += 2) {
                int which = pair >= job->key[0].width;
                const struct by_position *part = job->key + which;
                int64_t within = which ? pair - job->key[0].width : pair, is_there = within < part->width;
                const int64_t *rows = at[part->is_by_slot];
                const uint16_t *from = is_there ? part->rows + g * part->step + within : NULL;
                for (int64_t p = half; p < half + 16; p++, key++) {
                    *key = 0;
                    if (is_there && rows[p] >= 0)
                        memcpy(key, from + rows[p] * part->stride, 4);
                }
            }
    const int64_t *rows = at[job->value.is_by_slot];
    const uint16_t *values = job->value.rows + g * job->value.step;
    for (int64_t w = 0; w < V; w += TILE_OUTPUTS) {
        uint32_t *value = (uint32_t *)(job->values + ((g * V / 32 + w / 32) * job->num_panels + n) * 2 * TILE_BYTES);
        for (int64_t half = w; half < w + TILE_OUTPUTS; half += 16)
            for (int64_t pair = 0; pair < 32; pair += 2, value += 16) {
                static const uint16_t none[16];
                int is_there = half < job->value.width;
                const uint16_t *low = is_there && rows[pair] >= 0 ? values + rows[pair] * job->value.stride + half : none;
                const uint16_t *high = is_there && rows[pair + 1] >= 0 ? values + rows[pair + 1] * job->value.stride + half : none;
                for (int o = 0; o < 16; o++)
                    value[o] = low[o] | (uint32_t)high[o] << 16;
            }
    }
}

/* Which of 16 places are in [from, to). */
static inline __mmask16 places_in(int64_t from, int64_t to)
{
    from = from < 0 ? 0 : from > 16 ? 16 : from;
    to = to < from ? from : to > 16 ? 16 : to;
    return (__mmask16)((1u << to) - (1u << from));
}

/* Rows [r0, r0 + num) of head g, num at most 32, of the n * H / G that look at it: rows of one position side by side. */
AMX_TARGET static void attend_positions(const struct prompt *job, int64_t g, int64_t r0, int64_t num)
{
    const struct attention *a = job->attention;
    int64_t W = job->key_width, V = job->value_width, share = a->H / job->G, first = job->end - job->n;
    int64_t width = job->key[0].width + job->key[1].width;
    uint16_t q[32 * MOST_WIDTH] __attribute__((aligned(64))), p[32 * LOOKED_AT] __attribute__((aligned(64)));
    float scores[32 * LOOKED_AT] __attribute__((aligned(64))), out[32 * MOST_WIDTH] __attribute__((aligned(64)));
    float most[32], total[32], c[2 * TILE_ROWS * TILE_OUTPUTS] __attribute__((aligned(64)));
    memset(q, 0, sizeof q);
    memset(out, 0, sizeof out);
    for (int64_t i = 0; i < num; i++) {
        int64_t row = (r0 + i) / share, head = g * share + (r0 + i) % share;
        amx_narrow(in_tiles(q, i, W / TILE_K), job->q + (row * a->H + head) * width, width);
        most[i] = a->sinks ? a->sinks[head] * 1.44269504f : -INFINITY;
        total[i] = a->sinks ? 1 : 0;
    }
    int64_t begin = 0, end = first + (r0 + num - 1) / share + 1;
    if (a->window && first + r0 / share + 1 > a->window)
        begin = (first + r0 / share + 1 - a->window) / LOOKED_AT * LOOKED_AT;
    struct rest none = {0};
    set_tiles(num);
    for (int64_t at = begin; at < end; at += LOOKED_AT) {
        int64_t panels_here = (job->end - at + 31) / 32 < LOOKED_AT / 32 ? (job->end - at + 31) / 32 : LOOKED_AT / 32;
        const char *keys = job->keys + (g * job->num_panels + at / 32) * W * 64;
        for (int64_t n = 0; n < panels_here; n++)
            amx_product(q, W / 32, num, keys + n * W * 64, W / 32, scores + n * 32, LOOKED_AT, (struct ahead){0}, nothing, &none);
        for (int64_t i = 0; i < num; i++) {
            int64_t to = first + (r0 + i) / share + 1, from = a->window && to > a->window ? to - a->window : 0;
            int64_t vectors = (to - at + 15) / 16;
            vectors = vectors < 0 ? 0 : vectors > LOOKED_AT / 16 ? LOOKED_AT / 16 : vectors;
            __m512 scaling = _mm512_set1_ps(a->scaling * 1.44269504f), highest = _mm512_set1_ps(-INFINITY), sum = {0};
            float *row = scores + i * LOOKED_AT;
            for (int64_t v = 0; v < vectors; v++) {
                __m512 s = _mm512_load_ps(row + 16 * v) * scaling;
                _mm512_store_ps(row + 16 * v, s);
                highest = _mm512_mask_max_ps(highest, places_in(from - at - 16 * v, to - at - 16 * v), highest, s);
            }
            float before = most[i], here = _mm512_reduce_max_ps(highest);
            uint16_t *narrow = in_tiles(p, i, LOOKED_AT / TILE_K);
            if (here == -INFINITY) { /* nothing that it may look at */
                for (int64_t k = 0; k < LOOKED_AT / TILE_K; k++)
                    memset(narrow + k * TILE_ROWS * TILE_K, 0, 2 * TILE_K);
                continue;
            }
            most[i] = here > before ? here : before;
            for (int64_t v = 0; v < LOOKED_AT / 16; v++) {
                __m512 e = {0};
                __mmask16 there = v < vectors ? places_in(from - at - 16 * v, to - at - 16 * v) : 0;
                if (there)
                    e = _mm512_maskz_mov_ps(there, amx_exp2(_mm512_load_ps(row + 16 * v) - most[i]));
                sum += e;
                _mm256_store_si256((__m256i *)(narrow + v / 2 * TILE_ROWS * TILE_K + v % 2 * 16), (__m256i)_mm512_cvtneps_pbh(e));
            }
            float kept = before == -INFINITY ? 0 : exp2f(before - most[i]);
            total[i] = total[i] * kept + _mm512_reduce_add_ps(sum);
            if (kept != 1)
                for (int64_t w = 0; w < V; w += 16)
                    _mm512_store_ps(out + i * V + w, _mm512_load_ps(out + i * V + w) * _mm512_set1_ps(kept));
        }
        for (int64_t w = 0; w < V; w += TILE_OUTPUTS) {
            const char *values = job->values + ((g * V / 32 + w / 32) * job->num_panels + at / 32) * 2 * TILE_BYTES;
            amx_product(p, LOOKED_AT / TILE_K, num, values, panels_here, c, TILE_OUTPUTS, (struct ahead){0}, nothing, &none);
            for (int64_t i = 0; i < num; i++)
                for (int half = 0; half < 32; half += 16)
                    _mm512_store_ps(out + i * V + w + half, _mm512_load_ps(out + i * V + w + half) +
                                                               _mm512_load_ps(c + i * TILE_OUTPUTS + half));
        }
    }
    _tile_release();
    for (int64_t i = 0; i < num; i++) {
        int64_t row = (r0 + i) / share, head = g * share + (r0 + i) % share;
        float *to = job->out + (row * a->H + head) * job->value.width, whole = total[i];
        for (int64_t w = 0; w < job->value.width; w += 16)
            _mm512_storeu_ps(to + w, _mm512_load_ps(out + i * V + w) / _mm512_set1_ps(whole));
    }
}
