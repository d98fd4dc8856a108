/* A decoder layer but for its routed experts, and what lies around the layers: kernels.c includes this file.
 *
 * h [T, D] is the residual stream, in float; what is called a row's is one after another for T rows. Rows of queries and keys
 * whose rotation takes neighbours together come with those of their weights reordered, so that halves are rotated here.
 */

enum { ROWS_AT_ONCE = 16, MOST_FORETOLD = 512 }; /* the latter: choices of a row */

/* Rows of a step between two products, some at a time; few are done by who calls. */
struct rows {
    const struct layer *layer;
    void (*one)(const struct rows *, int64_t);
    int64_t T;
    float *h, *q, *scratch, *weights;
    const float *cos, *sin;
    const int64_t *slots;
    void *x;
    int64_t *ids;
};

static void rows_task(const void *at, int64_t task)
{
    const struct rows *rows = at;
    for (int64_t t = task * ROWS_AT_ONCE; t < rows->T && t < (task + 1) * ROWS_AT_ONCE; t++)
        rows->one(rows, t);
}

static void for_rows(struct rows *rows, void (*one)(const struct rows *, int64_t), int num_threads, int has_more)
{
    rows->one = one;
    run_all((rows->T + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, rows_task, rows, num_threads, has_more);
}

static void norm_row(float *out, const float *x, const struct norm *norm, int64_t n)
{
    if (norm->is_centred)
        isa->centre(out, x, norm->weight, norm->bias, n, norm->eps);
    else
        isa->norm(out, x, norm->weight, n, norm->eps);
}

/* --- queries, keys and values --- */

static int64_t projected(const struct layer *l) /* numbers of a row that the first product gives */
{
    const struct attention *a = &l->attention;
    int64_t queries = l->query_rank ? l->query_rank : a->H * l->head_width;
    return queries + (a->rotary ? a->W + a->rotary : 2 * a->G * a->W);
}

/* Floats of scratch that a row needs anywhere. */
int64_t collegium_scratch_floats(const struct layer *l)
{
    int64_t gate = 2 * l->E + l->K, qkv = projected(l);
    return l->D + (qkv > gate ? qkv : gate);
}

static void norm_input(const struct rows *rows, int64_t t)
{
    int64_t D = rows->layer->D;
    norm_row(rows->scratch + t * D, rows->h + t * D, &rows->layer->input_norm, D);
}

static void clip_row(float *row, int64_t n, float most)
{
    if (most > 0)
        for (int64_t i = 0; i < n; i++)
            row[i] = row[i] > most ? most : row[i] < -most ? -most : row[i];
}

/* Norm some heads, where each is, and rotate them, in place. */
static void turn_heads(const struct rows *rows, int64_t t, float *heads, int64_t num, const struct norm *norm)
{
    const struct layer *l = rows->layer;
    const float *cos = rows->cos + t * l->rotated, *sin = rows->sin + t * l->rotated;
    for (float *one = heads; one < heads + num * l->head_width; one += l->head_width) {
        if (norm && l->head_norms == EACH_HEAD)
            norm_row(one, one, norm, l->head_width);
        isa->rotate(one + l->rotate_from, cos, sin, l->rotated);
        if (norm && l->head_norms == EACH_ROTATED)
            norm_row(one, one, norm, l->head_width);
    }
}

static void rotate_heads(const struct rows *rows, int64_t t)
{
    const struct layer *l = rows->layer;
    const struct attention *a = &l->attention;
    int64_t num_q = a->H * a->W, num_kv = a->G * a->W, all = num_q + 2 * num_kv;
    float *row = rows->scratch + rows->T * l->D + t * all, *k = row + num_q;
    if (l->head_norms == ALL_HEADS) {
        norm_row(row, row, &l->query_norm, num_q);
        norm_row(k, k, &l->key_norm, num_kv);
    }
    clip_row(row, all, l->clip);
    turn_heads(rows, t, row, a->H, &l->query_norm);
    turn_heads(rows, t, k, a->G, &l->key_norm);
    memcpy(rows->q + t * num_q, row, num_q * sizeof(float));
    isa->narrow(a->keys, rows->slots[t] * num_kv, k, num_kv, a->is_bf16);
    isa->narrow(a->values, rows->slots[t] * num_kv, k + num_kv, num_kv, a->is_bf16);
}

static void norm_latent_query(const struct rows *rows, int64_t t)
{
    const struct layer *l = rows->layer;
    float *row = rows->scratch + rows->T * l->D + t * projected(l);
    norm_row(row, row, &l->query_norm, l->query_rank);
}

static void keep_latent(const struct rows *rows, int64_t t)
{
    const struct layer *l = rows->layer;
    const struct attention *a = &l->attention;
    int64_t num_q = a->H * l->head_width, all = projected(l);
    float *row = rows->scratch + rows->T * l->D + t * all, *latent = row + all - a->W - a->rotary, *key = latent + a->W;
    if (!l->query_rank)
        memcpy(rows->q + t * num_q, row, num_q * sizeof(float));
    turn_heads(rows, t, rows->q + t * num_q, a->H, NULL);
    norm_row(latent, latent, &l->key_norm, a->W);
    isa->rotate(key, rows->cos + t * l->rotated, rows->sin + t * l->rotated, l->rotated);
    isa->narrow(a->keys, rows->slots[t] * a->W, latent, a->W, a->is_bf16);
    isa->narrow(a->values, rows->slots[t] * a->rotary, key, a->rotary, a->is_bf16);
}

/* q [T, H * head_width] of rows h, rotated; what is cached of them goes to the slots of the pools. cos, sin [T, rotated]; scratch
 * [T, collegium_scratch_floats]. */
void collegium_qkv(const struct layer *l, const float *h, const float *cos, const float *sin, const int64_t *slots, int64_t T,
                   float *q, float *scratch, int num_threads)
{
    const struct attention *a = &l->attention;
    int64_t all = projected(l), num_q = a->H * l->head_width;
    struct rows rows = {.layer = l, .T = T, .h = (float *)h, .q = q, .scratch = scratch, .cos = cos, .sin = sin, .slots = slots};
    for_rows(&rows, norm_input, num_threads, 1);
    collegium_linear(scratch, l->D, l->qkv, l->qkv_bias, scratch + T * l->D, T, all, l->D, a->is_bf16, 0, num_threads);
    if (!a->rotary) {
        for_rows(&rows, rotate_heads, num_threads, 0);
        return;
    }
    if (l->query_rank) {
        for_rows(&rows, norm_latent_query, num_threads, 1);
        run_linear(scratch + T * l->D, all, l->query_up, NULL, q, num_q, T, num_q, l->query_rank, a->is_bf16, 0, num_threads);
    }
    for_rows(&rows, keep_latent, num_threads, 0);
}

/* --- attention --- */

static void attend_task(const void *at, int64_t task)
{
    const struct attend *job = at;
    int64_t parts = looking_parts(job->attention);
    float *scratch = malloc((job->attention->rotary ? 5 : 3) * sizeof(float) * job->longest);
    if (!scratch)
        abort(); /* 12 or 20 bytes a position */
    isa->attend(job, task / parts, task % parts, scratch);
    free(scratch);
}

static void run_attend(const struct attention *a, const float *q, const int64_t *blocks, const int64_t *first_block,
                       const int64_t *lengths, int64_t B, float *out, int num_threads)
{
    struct attend job = {a, q, blocks, first_block, lengths, out, 0};
    int64_t total = 0;
    for (int64_t b = 0; b < B; b++) {
        job.longest = lengths[b] > job.longest ? lengths[b] : job.longest;
        total += lengths[b];
    }
    if (total * a->H * a->W < 1 << 16) /* so little that waking a thread takes longer */
        num_threads = 1;
    run_all(B * looking_parts(a), attend_task, &job, num_threads, 0);
}

/* out [B, H * value_width]: each of B decoding rows looks at its `lengths` positions, in blocks first_block[row].. of `blocks`.
 * Latent keys are looked at as they are: what would expand them is applied to the query, and to the result. Returns 0, or -1
 * where memory lacks. */
int collegium_attend(const struct layer *l, const float *q, const int64_t *blocks, const int64_t *first_block,
                     const int64_t *lengths, int64_t B, float *out, int num_threads)
{
    const struct attention *a = &l->attention;
    if (!a->rotary) {
        run_attend(a, q, blocks, first_block, lengths, B, out, num_threads);
        return 0;
    }
    int64_t H = a->H, wide = H * (a->W + a->rotary), plain = l->head_width - a->rotary;
    float *absorbed = take_scratch((size_t)(B * (wide + H * a->W)) * sizeof *absorbed), *mixed = absorbed + B * wide;
    if (!absorbed)
        return -1;
    for (int64_t head = 0; head < H; head++) {
        float *to = absorbed + head * (a->W + a->rotary);
        const float *from = q + head * l->head_width;
        run_linear(from, H * l->head_width, (const char *)l->absorb + head * l->absorb_bytes, NULL, to, wide, B, a->W, plain,
                   a->is_bf16, 0, num_threads);
        for (int64_t b = 0; b < B; b++)
            memcpy(to + b * wide + a->W, from + b * H * l->head_width + plain, a->rotary * sizeof *to);
    }
    run_attend(a, absorbed, blocks, first_block, lengths, B, mixed, num_threads);
    for (int64_t head = 0; head < H; head++)
        run_linear(mixed + head * a->W, H * a->W, (const char *)l->value_up + head * l->value_up_bytes, NULL,
                   out + head * l->value_width, H * l->value_width, B, l->value_width, a->W, a->is_bf16, 0, num_threads);
    give_scratch(absorbed);
    return 0;
}

/* out [B, H * W]: each of B rows looks at all of its source's positions, in tables as collegium_attend takes them. */
void collegium_attend_source(const struct layer *l, const float *q, const int64_t *blocks, const int64_t *first_block,
                             const int64_t *lengths, int64_t B, float *out, int num_threads)
{
    struct attention source = l->attention;
    source.window = 0;
    source.sinks = source.by_distance = NULL;
    run_attend(&source, q, blocks, first_block, lengths, B, out, num_threads);
}

#define AROUND_TASK_ROWS 256 /* of one head; each task turns its source's keys anew */

static void look_around_task(const void *at, int64_t task)
{
    const struct around *job = at;
    const struct attention *a = job->attention;
    int64_t source = 0, blocks;
    for (;; source++) {
        blocks = (job->lengths[source] + AROUND_TASK_ROWS - 1) / AROUND_TASK_ROWS;
        if (task < blocks * a->H)
            break;
        task -= blocks * a->H;
    }
    int64_t n = job->lengths[source], first = task % blocks * AROUND_TASK_ROWS;
    int64_t padded = (n + MOST_LANES - 1) / MOST_LANES * MOST_LANES, stride = (a->W + MOST_LANES - 1) / MOST_LANES * MOST_LANES;
    float *scratch = malloc((a->W * padded + n * stride + MOST_AROUND * (padded + stride)) * sizeof *scratch);
    if (!scratch) {
        atomic_store(job->has_failed, 1);
        return;
    }
    isa->look_around(job, source, task / blocks, first, n - first < AROUND_TASK_ROWS ? n : first + AROUND_TASK_ROWS, scratch);
    free(scratch);
}

/* out [S, H * W]: rows of sources that lie one after another, lengths [N] of S in all, of at least 1 each, look at all of their own
 * source: q [S, H * W], keys and values [S, H * W] where the layer's pools are. by_distance [H, 2 * farthest + 1], or NULL. What a
 * row comes to doesn't depend on the other sources. 0, or -1: there is no memory. */
int collegium_attend_around(const struct layer *l, const float *q, const int64_t *lengths, int64_t N, const float *by_distance,
                            int64_t farthest, float *out, int num_threads)
{
    const struct attention *a = &l->attention;
    int64_t num_tasks = 0, work = 0, at = 0, *begins = malloc(N * sizeof *begins);
    _Atomic int has_failed = 0;
    if (!begins)
        return -1;
    for (int64_t n = 0; n < N; n++) {
        begins[n] = at;
        at += lengths[n];
        num_tasks += (lengths[n] + AROUND_TASK_ROWS - 1) / AROUND_TASK_ROWS * a->H;
        work += lengths[n] * lengths[n] * a->H * a->W;
    }
    struct around job = {a, q, begins, lengths, by_distance, farthest, out, &has_failed};
    run_all(num_tasks, look_around_task, &job, work < 1 << 16 ? 1 : num_threads, 0);
    free(begins);
    return has_failed ? -1 : 0;
}

static void pack_positions_task(const void *at, int64_t task)
{
    const struct prompt *job = at;
    isa->pack_positions(job, task / job->num_panels, task % job->num_panels);
}

static int64_t query_blocks(const struct prompt *job)
{
    return (job->n * (job->attention->H / job->G) + 31) / 32;
}

static void attend_prompt_task(const void *at, int64_t task)
{
    const struct prompt *job = at;
    int64_t blocks = query_blocks(job), begin = (blocks - 1 - task % blocks) * 32; /* the longest first */
    int64_t left = job->n * (job->attention->H / job->G) - begin;
    isa->attend_positions(job, task / blocks, begin, left < 32 ? left : 32);
}

/* Latents [end, W] of a sequence's positions in float, for what they stand for; the rest of a key is not latent. */
static void gather_latents(const struct attention *a, const int64_t *slots, int64_t end, float *to)
{
    for (int64_t p = 0; p < end; p++)
        collegium_widen(to + p * a->W, (const uint16_t *)a->keys + slots[p] * a->W, a->W);
}

/* out [n, H * value_width]: the rows of a prompt's positions end - n to end - 1, q [n, H * head_width], look at what is before them
 * and at themselves, or at as many of that as the window has; slots [end] say where keys and values are. Latent keys are expanded.
 * 0, or 1: not computed here, for the instructions or the heads' widths, or -1: there is no memory. */
int collegium_attend_prompt(const struct layer *l, const float *q, const int64_t *slots, int64_t n, int64_t end, float *out,
                            int num_threads)
{
    const struct attention *a = &l->attention;
    int64_t plain = l->head_width - a->rotary, K = (l->head_width + 31) / 32 * 32, V = (l->value_width + 31) / 32 * 32;
    int64_t num_panels = (end + 31) / 32, G = a->rotary ? a->H : a->G, wide = a->H * (plain + l->value_width);
    if (!isa->attend_positions || !a->is_bf16 || K > MOST_WIDTH || V > MOST_WIDTH || l->value_width % 16 || plain % 2 ||
        a->rotary % 2)
        return 1;
    int64_t key_bytes = G * num_panels * K * 64, value_bytes = G * num_panels * V * 64, latent_bytes = 0, wide_bytes = 0;
    if (a->rotary) {
        latent_bytes = (end * a->W * 4 + 63) / 64 * 64;
        wide_bytes = end * wide * 2;
    }
    char *memory = take_scratch((size_t)(key_bytes + value_bytes + latent_bytes + wide_bytes));
    if (!memory)
        return -1;
    struct prompt job = {.attention = a, .q = q, .slots = slots, .n = n, .end = end, .num_panels = num_panels, .G = G, .key_width = K,
                         .value_width = V, .out = out, .keys = memory, .values = memory + key_bytes};
    if (a->rotary) {
        float *latents = (float *)(memory + key_bytes + value_bytes);
        uint16_t *expanded = (uint16_t *)((char *)latents + latent_bytes);
        gather_latents(a, slots, end, latents);
        collegium_linear(latents, a->W, l->up, NULL, expanded, end, wide, a->W, 1, 1, num_threads);
        job.key[0] = (struct by_position){expanded, wide, plain + l->value_width, plain, 0};
        job.key[1] = (struct by_position){a->values, a->rotary, 0, a->rotary, 1};
        job.value = (struct by_position){expanded + plain, wide, plain + l->value_width, l->value_width, 0};
    } else {
        job.key[0] = (struct by_position){a->keys, G * a->W, a->W, a->W, 1};
        job.value = (struct by_position){a->values, G * a->W, a->W, a->W, 1};
    }
    run_all(G * num_panels, pack_positions_task, &job, num_threads, 1);
    run_all(G * query_blocks(&job), attend_prompt_task, &job, num_threads, 0);
    atomic_store(&pool.has_more, 0);
    give_scratch(memory);
    return 0;
}

/* --- gates --- */

static int64_t highest_of(const float *scores, int64_t E)
{
    int64_t best = 0;
    for (int64_t e = 1; e < E; e++)
        if (scores[e] > scores[best])
            best = e;
    return best;
}

/* The K highest of scores [E], falling, the first of equals first; theirs become -infinity. */
static void take_highest(float *scores, int64_t E, int64_t K, int64_t *ids)
{
    for (int64_t k = 0; k < K; k++) {
        ids[k] = highest_of(scores, E);
        scores[ids[k]] = -INFINITY;
    }
}

/* Leave the groups of experts that are kept: the scores of all others become -infinity. */
static void keep_groups(const struct gate *gate, float *scores, int64_t E)
{
    int64_t size = E / gate->num_groups, num_out = gate->num_groups - gate->kept_groups;
    for (int64_t out = 0; out < num_out; out++) { /* the lowest that is still there goes, the last of equals first */
        int64_t lowest = -1;
        float least = 0;
        for (int64_t g = 0; g < gate->num_groups; g++) {
            float first = -INFINITY, second = -INFINITY;
            for (float *one = scores + g * size; one < scores + (g + 1) * size; one++)
                if (*one > first) {
                    second = first;
                    first = *one;
                } else if (*one > second)
                    second = *one;
            if (first == -INFINITY)
                continue;
            float sum = gate->group_tops > 1 && second > -INFINITY ? first + second : first;
            if (lowest < 0 || sum <= least) {
                lowest = g;
                least = sum;
            }
        }
        for (int64_t e = 0; lowest >= 0 && e < size; e++)
            scores[lowest * size + e] = -INFINITY;
    }
}

/* The weight of the highest of scores [E], and its id: a softmax over those that are near it. `all` [E] is what nearness is
 * relative to (Liu et al., Sparse Backpropagation for MoE Training, 2023). */
static float mix_sparsely(const float *scores, const float *all, int64_t E, float jitter, int64_t *id)
{
    float most = scores[*id = highest_of(scores, E)], total = 0;
    for (int64_t e = 0; e < E; e++) {
        float factor = fabsf(all[e]) > most ? fabsf(all[e]) : most;
        if (scores[e] > -INFINITY && !((most - all[e]) / factor > 2 * jitter))
            total += expf(scores[e] - most);
    }
    return 1 / total;
}

/* What a gate chooses by its scores [E], which are overwritten: ids and weights [K]; scratch [E]. */
static void choose_experts(const struct gate *gate, float *scores, int64_t E, int64_t K, int64_t *ids, float *weights, float *scratch)
{
    if (gate->kind == SPARSE_MIXER_GATE) {
        memcpy(scratch, scores, E * sizeof *scores);
        for (int64_t k = 0; k < K; k++) {
            weights[k] = mix_sparsely(scratch, scores, E, gate->jitter, ids + k);
            scratch[ids[k]] = -INFINITY;
        }
        return;
    }
    float total = 1, norm = 0;
    if (gate->kind == SOFTMAX_GATE) {
        float most = scores[highest_of(scores, E)];
        total = 0;
        for (int64_t e = 0; e < E; e++)
            total += scores[e] = expf(scores[e] - most);
        if (gate->correction) { /* it is of the shares; else their order is that of these */
            for (int64_t e = 0; e < E; e++)
                scores[e] /= total;
            total = 1;
        }
    } else if (gate->kind == SIGMOID_GATE)
        for (int64_t e = 0; e < E; e++)
            scores[e] = 1 / (1 + expf(-scores[e]));
    memcpy(scratch, scores, E * sizeof *scores);
    if (gate->correction)
        for (int64_t e = 0; e < E; e++)
            scratch[e] += gate->correction[e];
    if (gate->num_groups > 1)
        keep_groups(gate, scratch, E);
    take_highest(scratch, E, K, ids);
    for (int64_t k = 0; k < K; k++) {
        weights[k] = gate->kind == CHOSEN_SOFTMAX_GATE ? expf(scores[ids[k]] - scores[ids[0]]) : scores[ids[k]] / total;
        norm += gate->power == 1 ? weights[k] : powf(weights[k], gate->power);
    }
    if (gate->power > 0 && gate->power != 1)
        norm = powf(norm, 1 / gate->power);
    for (int64_t k = 0; k < K; k++)
        weights[k] = (gate->power > 0 ? weights[k] / norm : weights[k]) * gate->scale;
}

/* --- after attention --- */

static float *add_row(const struct rows *rows, int64_t t)
{
    int64_t D = rows->layer->D;
    float *h = rows->h + t * D, *row = rows->scratch + t * D;
    for (int64_t i = 0; i < D; i++)
        h[i] += row[i] * rows->layer->residual;
    return h;
}

static void add_and_norm_for_source(const struct rows *rows, int64_t t)
{
    int64_t D = rows->layer->D;
    norm_row(rows->scratch + t * D, add_row(rows, t), &rows->layer->cross.norm, D);
}

/* h += attended [T, H * W] @ out.T; q [T, H * W] is what h, normed, asks of its source. scratch as collegium_output. */
void collegium_query_source(const struct layer *l, const float *attended, float *h, int64_t T, float *q, float *scratch,
                            int num_threads)
{
    int64_t D = l->D, width = l->attention.H * l->value_width;
    int is_bf16 = l->attention.is_bf16;
    struct rows rows = {.layer = l, .T = T, .h = h, .scratch = scratch};
    collegium_linear(attended, width, l->out, l->out_bias, scratch, T, D, width, is_bf16, 0, num_threads);
    for_rows(&rows, add_and_norm_for_source, num_threads, 1);
    collegium_linear(scratch, D, l->cross.query, l->cross.query_bias, q, T, width, D, is_bf16, 0, num_threads);
}

static void add_and_norm(const struct rows *rows, int64_t t)
{
    const struct layer *l = rows->layer;
    int64_t D = l->D, is_bf16 = l->attention.is_bf16;
    float *h = add_row(rows, t), *row = rows->scratch + t * D;
    norm_row(row, h, &l->output_norm, D);
    isa->narrow(rows->x, t * D, row, D, is_bf16);
    if (is_bf16) /* the gate sees what the experts will */
        collegium_widen(row, (const uint16_t *)rows->x + t * D, D);
}

static void ask_gate(const struct rows *rows, int64_t t)
{
    const struct layer *l = rows->layer;
    int64_t E = l->E, K = l->K - l->gate.num_shared, *ids = rows->ids + t * l->K;
    float *logits = rows->scratch + rows->T * l->D + t * E, *weights = rows->weights + t * l->K;
    int is_usable = 1;
    for (int64_t e = 0; e < E; e++)
        is_usable &= logits[e] - logits[e] == 0; /* neither NaN nor infinite */
    if (is_usable)
        choose_experts(&l->gate, logits, E, K, ids, weights, logits + rows->T * E);
    else
        for (int64_t k = 0; k < K; k++) {
            ids[k] = k;
            weights[k] = (float)NAN;
        }
    for (int64_t s = 0; s < l->gate.num_shared; s++) {
        ids[K + s] = E + s;
        weights[K + s] = 1;
    }
}

/* h += attended [T, H * value_width] @ out.T, the source's where there is one; x [T, D], in the model's type, is h normed; where there are experts, ids and weights
 * [T, K] are what the gate chooses for x. Where scores are not numbers, so are weights, and ids are 0 to K - 1. scratch [T,
 * collegium_scratch_floats]. */
void collegium_output(const struct layer *l, const float *attended, float *h, int64_t T, void *x, int64_t *ids, float *weights,
                      float *scratch, int num_threads)
{
    int64_t D = l->D, width = l->attention.H * l->value_width;
    int is_bf16 = l->attention.is_bf16;
    struct rows rows = {.layer = l, .T = T, .h = h, .scratch = scratch, .x = x, .ids = ids, .weights = weights};
    const void *out = l->cross.query ? l->cross.out : l->out, *bias = l->cross.query ? l->cross.out_bias : l->out_bias;
    collegium_linear(attended, width, out, bias, scratch, T, D, width, is_bf16, 0, num_threads);
    for_rows(&rows, add_and_norm, num_threads, l->E > 0);
    if (!l->E)
        return;
    collegium_linear(scratch, D, l->gate.weight, l->gate.bias, scratch + T * D, T, l->E, D, l->gate.is_bf16, 0, num_threads);
    for_rows(&rows, ask_gate, num_threads, 0);
}

/* h [T, D] += residual * what the layer's own expert makes of x [T, D], which is in the model's type. Returns 0, or -1 where memory
 * lacks. */
int collegium_mlp(const struct layer *l, const void *x, int64_t T, float *h, int num_threads)
{
    const struct mlp *m = &l->mlp;
    const struct expert_shape *s = m->shape;
    int is_narrow = has_tiles(s->is_bf16);
    int64_t D = s->D, wide = s->is_bf16 && (!is_narrow || m->gate) ? T * D : 0, start = 0;
    int64_t *rows = take_scratch(T * sizeof *rows + (wide + T * (D + 1 + (is_narrow ? 0 : s->F))) * sizeof(float));
    if (!rows)
        return -1;
    float *wider = (float *)(rows + T), *y = wider + wide, *scores = y + T * D, *hidden = is_narrow ? NULL : scores + T;
    if (wide)
        collegium_widen(wider, x, wide);
    const float *from = wide ? wider : x;
    for (int64_t t = 0; t < T; t++)
        rows[t] = t;
    if (m->gate)
        collegium_linear(from, D, m->gate, NULL, scores, T, 1, D, s->is_bf16, 0, num_threads);
    int failed = compute_experts(s, from, is_narrow ? x : NULL, rows, &start, &T, &m->weights, 1, hidden, y, num_threads);
    for (int64_t t = 0; t < T && !failed; t++) {
        float scale = l->residual * (m->gate ? 1 / (1 + expf(-scores[t])) : 1);
        for (int64_t i = t * D; i < (t + 1) * D; i++)
            h[i] += y[i] * scale;
    }
    give_scratch(rows);
    return failed ? -1 : 0;
}

/* ids [T, K]: what the gate would choose for rows x [T, D] in the model's type. scratch [T, collegium_scratch_floats]. */
void collegium_foretell(const struct layer *l, const void *x, int64_t T, int32_t *ids, float *scratch, int num_threads)
{
    int64_t D = l->D, E = l->E, K = l->K - l->gate.num_shared, chosen[MOST_FORETOLD];
    int is_bf16 = l->attention.is_bf16;
    const struct gate *gate = &l->gate;
    if (is_bf16)
        collegium_widen(scratch, x, T * D);
    float *logits = scratch + T * D, *spare = logits + T * E, *weights = spare + T * E;
    collegium_linear(is_bf16 ? scratch : x, D, gate->weight, gate->bias, logits, T, E, D, gate->is_bf16, 0, num_threads);
    for (int64_t t = 0; t < T; t++, logits += E) {
        int is_usable = K <= MOST_FORETOLD;
        for (int64_t e = 0; e < E; e++)
            is_usable &= logits[e] - logits[e] == 0;
        /* the highest are chosen whatever weights are made of them, unless something else than they decides */
        if (is_usable && (gate->num_groups > 1 || gate->correction))
            choose_experts(gate, logits, E, K, chosen, weights, spare);
        else if (is_usable)
            take_highest(logits, E, K, chosen);
        for (int64_t k = 0; k < K; k++)
            ids[t * l->K + k] = (int32_t)(is_usable ? chosen[k] : k); /* of scores that are not numbers: anything */
        for (int64_t s = 0; s < gate->num_shared; s++)
            ids[t * l->K + K + s] = (int32_t)(E + s);
    }
}

/* --- around the layers --- */

/* out [T, D] = h normed */
void collegium_norm(float *out, const float *h, const struct norm *norm, int64_t T, int64_t D)
{
    for (int64_t t = 0; t < T; t++)
        norm_row(out + t * D, h + t * D, norm, D);
}

/* x [T, D], in the model's type, = h normed; scratch [D] */
void collegium_norm_rows(void *x, const float *h, const struct norm *norm, int64_t T, int64_t D, int is_bf16, float *scratch)
{
    for (int64_t t = 0; t < T; t++) {
        norm_row(scratch, h + t * D, norm, D);
        isa->narrow(x, t * D, scratch, D, is_bf16);
    }
}

/* h [T, D] = the rows of `table`, which is in the model's type, that `tokens` name, times scale */
void collegium_embed(float *h, const void *table, const int64_t *tokens, int64_t T, int64_t D, float scale, int is_bf16)
{
    for (int64_t t = 0; t < T; t++)
        if (is_bf16)
            collegium_widen(h + t * D, (const uint16_t *)table + tokens[t] * D, D);
        else
            memcpy(h + t * D, (const float *)table + tokens[t] * D, D * sizeof *h);
    if (scale != 1)
        for (int64_t i = 0; i < T * D; i++)
            h[i] *= scale;
}

/* h [n] += scale * y [n], which is in the model's type */
void collegium_add(float *h, const void *y, int64_t n, float scale, int is_bf16)
{
    if (is_bf16)
        for (int64_t i = 0; i < n; i++)
            h[i] += from_bf16(((const uint16_t *)y)[i]) * scale;
    else
        for (int64_t i = 0; i < n; i++)
            h[i] += ((const float *)y)[i] * scale;
}
