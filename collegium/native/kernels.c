/* Expert kernels for CPUs: from one row to thousands, weights read once per call, float32 sums.
 *
 * A plain C library without dependencies, loaded through ctypes (which lets go of the interpreter lock); the modules
 * beside this file are its only callers and say what it offers. The arithmetic is in tiles.h, built once per
 * instruction set and chosen when the library is loaded, and for bfloat16 on matrix units in amx.h. Each bfloat16 weight
 * is read from memory once, as 2 bytes.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "layer.h"

enum { SILU, GELU, GELU_TANH, RELU, CLAMPED_SWIGLU };
enum { AHEAD = 1024, SPINS = 4000, TASK_BYTES = 96 << 10 };

struct linear {
    const float *x;
    int64_t x_stride;
    const void *weight, *bias;
    void *out;
    int64_t out_stride, R, O, K;
    int is_bf16, is_out_bf16;
    const uint16_t *narrow; /* x for matrix units, see amx.h */
};

struct experts {
    const struct expert_shape *shape;
    const float *x;
    const int64_t *pair_rows, *starts, *counts;
    const void *const *weights;
    float *hidden, *y;
    /* for matrix units, see amx.h: rows of x and of hidden, group g's from places[g] on */
    uint16_t *narrow, *narrow_hidden;
    const int64_t *places;
};

struct attend {
    const struct attention *attention;
    const float *q; /* [B, H * (W + rotary)] */
    const int64_t *blocks, *first_block, *lengths;
    float *out;
    int64_t longest;
};

#define MOST_AROUND 8 /* rows at once, of one head */
#define MOST_LANES 16

/* Rows of sources that lie one after another, each of which looks at all of its own. */
struct around {
    const struct attention *attention; /* keys, values [S, H * W], not in blocks */
    const float *q;                    /* [S, H * W] */
    const int64_t *begins, *lengths;   /* of each source */
    const float *by_distance;          /* [H, 2 * farthest + 1] added to scores, from as far behind to as far ahead; NULL: nothing */
    int64_t farthest;
    float *out; /* [S, H * W] */
    _Atomic int *has_failed;
};

/* Into how many parts the heads of a row are divided: those of a part look at the same keys. */
static inline int64_t looking_parts(const struct attention *a)
{
    return a->rotary ? a->H : a->G;
}

enum { MOST_WIDTH = 256 }; /* of a head, where attention over prompts is computed here */

/* Bfloat16 rows by position, `stride` numbers apart, and by head, `step`: `width` numbers each. */
struct by_position {
    const uint16_t *rows;
    int64_t stride, step, width;
    int is_by_slot; /* rows are the pool's, not the sequence's one after another */
};

/* Rows of a prompt, n of them up to position `end`, and packed keys and values of all positions up to there. */
struct prompt {
    const struct attention *attention;
    const float *q;       /* [n, H * key_width] */
    const int64_t *slots; /* [end] */
    int64_t n, end, num_panels; /* a panel has 32 positions */
    int64_t G, key_width, value_width; /* heads of keys and values; widths rounded up to 32 */
    struct by_position key[2], value; /* a key is made of one part or of two */
    float *out;          /* [n, H * value's width] */
    char *keys, *values; /* [G, num_panels, key_width * 32] and [G, value_width / 32, num_panels, 32 * 32] */
};

struct isa {
    int64_t width, k_of_bf16; /* of a panel: outputs; inputs are so many in bfloat16, or a multiple */
    void (*linear)(const struct linear *, int64_t, int64_t);
    void (*gate_up)(const struct experts *, int64_t, int64_t, int64_t);
    void (*down)(const struct experts *, int64_t, int64_t, int64_t);
    void (*pack)(void *, const void *, int64_t, int64_t, int);
    void (*norm)(float *, const float *, const float *, int64_t, float);
    void (*centre)(float *, const float *, const float *, const float *, int64_t, float);
    void (*rotate)(float *, const float *, const float *, int64_t);
    void (*narrow)(void *, int64_t, const float *, int64_t, int);
    void (*attend)(const struct attend *, int64_t, int64_t, float *);
    void (*pack_positions)(const struct prompt *, int64_t, int64_t);
    void (*attend_positions)(const struct prompt *, int64_t, int64_t, int64_t); /* NULL: attention over prompts is not ours */
    void (*look_around)(const struct around *, int64_t, int64_t, int64_t, int64_t, float *);
    double (*peak)(int64_t);
};

static inline float from_bf16(uint16_t bits)
{
    uint32_t word = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &word, 4);
    return value;
}

static inline uint16_t to_bf16(float value) /* to the nearest, ties to even; NaN stays NaN */
{
    uint32_t word;
    memcpy(&word, &value, 4);
    if (value != value)
        return (uint16_t)(word >> 16 | 0x40);
    return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

#define LANES 4
#define ROWS 6
#define SUFFIX _generic
#define TARGET
#include "tiles.h"

#if defined(__x86_64__)
#define LANES 8
#define ROWS 6
#define SUFFIX _avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "tiles.h"

#ifdef __clang__
#define WHOLE __attribute__((min_vector_width(512)))
#define WIDTH_512
#else
#define WHOLE
#define WIDTH_512 ",prefer-vector-width=512"
#endif
#define LANES 16
#define ROWS 12
#define SUFFIX _avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma" WIDTH_512))) WHOLE
#include "tiles.h"

#include "amx.h"
static const struct isa isa_amx = {32,            TILE_K,        linear_amx,    gate_up_amx,   down_amx,       pack_amx,        norm_avx512,
                                   centre_avx512, rotate_avx512, narrow_amx, attend_avx512, pack_positions, attend_positions,
                                   look_around_avx512, peak_amx};
#endif

static const struct isa *isa = &isa_generic;

/* Changes with every change of a function's arguments or of a struct: who calls compares it with its own number. */
int collegium_abi(void)
{
    return 21;
}

#if defined(__x86_64__)
/* Whether this process may use matrix units for bfloat16; the system is asked for leave, once and for all threads. */
static int has_amx(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1))
        return 0;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a >> 5 & 1)) /* avx512bf16 */
        return 0;
    return !syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */);
}
#endif

/* Choose the widest instruction set that is at most `most` (0 generic, 1 avx2, 2 avx512, 3 amx) and that this processor has.
 * Before any other call; packed weights of one choice mean nothing to another. Returns what was chosen. */
int collegium_choose(int most)
{
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        isa = most >= 3 && has_amx() ? &isa_amx : &isa_avx512;
        return isa == &isa_amx ? 3 : 2;
    }
    if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        isa = &isa_avx2;
        return 1;
    }
#else
    (void)most;
#endif
    isa = &isa_generic;
    return 0;
}

/* --- threads: the caller works, and helpers join it for what is left --- */

static struct {
    pthread_mutex_t owner;  /* held by the one caller that has the helpers; another computes alone */
    pthread_mutex_t lock;
    pthread_cond_t wake;
    int num_helpers;
    atomic_uint generation;
    int is_open;
    atomic_int num_active;
    void (*run)(const void *, int64_t);
    const void *job;
    int64_t num_tasks;
    atomic_llong next;
    int num_wanted;
    atomic_int has_more;    /* another job follows at once: helpers spin for it; else they would only be in the way */
} pool = {.owner = PTHREAD_MUTEX_INITIALIZER, .lock = PTHREAD_MUTEX_INITIALIZER, .wake = PTHREAD_COND_INITIALIZER};

static inline void relax(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

static void work(void)
{
    for (;;) {
        long long task = atomic_fetch_add(&pool.next, 1);
        if (task >= pool.num_tasks)
            return;
        pool.run(pool.job, task);
    }
}

static void *helper(void *number)
{
    unsigned seen = 0;
    for (;;) {
        for (int i = 0; i < SPINS && atomic_load_explicit(&pool.has_more, memory_order_relaxed) && atomic_load_explicit(&pool.generation, memory_order_relaxed) == seen; i++)
            relax();
        pthread_mutex_lock(&pool.lock);
        while (atomic_load(&pool.generation) == seen)
            pthread_cond_wait(&pool.wake, &pool.lock);
        seen = atomic_load(&pool.generation);
        int joins = pool.is_open && (intptr_t)number < pool.num_wanted;
        if (joins)
            atomic_fetch_add(&pool.num_active, 1);
        pthread_mutex_unlock(&pool.lock);
        if (joins) {
            work();
            atomic_fetch_sub(&pool.num_active, 1);
        }
    }
    return NULL;
}

static void run_all(int64_t num_tasks, void (*run)(const void *, int64_t), const void *job, int num_threads, int has_more)
{
    if (num_threads > num_tasks)
        num_threads = (int)num_tasks;
    if (num_threads <= 1 || pthread_mutex_trylock(&pool.owner) != 0) {
        for (int64_t task = 0; task < num_tasks; task++)
            run(job, task);
        return;
    }
    pthread_mutex_lock(&pool.lock);
    while (pool.num_helpers < num_threads - 1) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, (void *)(intptr_t)pool.num_helpers) != 0)
            break;
        pthread_detach(thread);
        pool.num_helpers++;
    }
    pool.run = run;
    pool.job = job;
    pool.num_tasks = num_tasks;
    pool.num_wanted = num_threads - 1;
    atomic_store(&pool.has_more, has_more);
    atomic_store(&pool.next, 0);
    pool.is_open = 1;
    atomic_fetch_add(&pool.generation, 1);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    work();
    pthread_mutex_lock(&pool.lock);
    pool.is_open = 0; /* who wakes now finds nothing left */
    pthread_mutex_unlock(&pool.lock);
    for (int64_t i = 0; atomic_load(&pool.num_active) != 0; i++) {
        if (i < SPINS)
            relax();
        else
            sched_yield(); /* a helper lost its core in the middle of a task */
    }
    pthread_mutex_unlock(&pool.owner);
}

/* --- memory between calls: what a call needs is as large as the last one's, and new memory costs a fault a page --- */

enum { NUM_KEPT = 4, MOST_KEPT_BYTES = 32 << 20 };

static struct {
    pthread_mutex_t lock;
    struct {
        void *memory;
        size_t bytes;
    } kept[NUM_KEPT];
} scratches = {.lock = PTHREAD_MUTEX_INITIALIZER};

/* A line of memory before each piece says how large it is. */
static void *take_scratch(size_t bytes)
{
    void *found = NULL;
    size_t least = SIZE_MAX;
    int best = -1;
    bytes = (bytes + 127) / 64 * 64;
    pthread_mutex_lock(&scratches.lock);
    for (int i = 0; i < NUM_KEPT; i++)
        if (scratches.kept[i].bytes >= bytes && scratches.kept[i].bytes < least) {
            least = scratches.kept[i].bytes;
            best = i;
        }
    if (best >= 0 && (least <= 4 * bytes || least <= 1 << 20)) {
        found = scratches.kept[best].memory;
        scratches.kept[best].memory = NULL;
        scratches.kept[best].bytes = 0;
    }
    pthread_mutex_unlock(&scratches.lock);
    if (!found) {
        found = aligned_alloc(64, bytes);
        if (!found)
            return NULL;
        *(size_t *)found = bytes;
    }
    return (char *)found + 64;
}

static void give_scratch(void *memory)
{
    if (!memory)
        return;
    void *whole = (char *)memory - 64;
    size_t bytes = *(size_t *)whole, smallest = bytes;
    int to = -1;
    if (bytes <= MOST_KEPT_BYTES) {
        pthread_mutex_lock(&scratches.lock);
        for (int i = 0; i < NUM_KEPT; i++)
            if (scratches.kept[i].bytes < smallest) {
                smallest = scratches.kept[i].bytes;
                to = i;
            }
        if (to >= 0) { /* in the place of the smallest, which goes instead */
            void *old = scratches.kept[to].memory;
            scratches.kept[to].memory = whole;
            scratches.kept[to].bytes = bytes;
            whole = old;
        }
        pthread_mutex_unlock(&scratches.lock);
    }
    free(whole);
}

/* --- what is offered --- */

static int64_t panels(int64_t outputs)
{
    return (outputs + isa->width - 1) / isa->width;
}

static int64_t padded(int64_t K, int is_bf16)
{
    return is_bf16 ? (K + isa->k_of_bf16 - 1) / isa->k_of_bf16 * isa->k_of_bf16 : K;
}

static int has_tiles(int is_bf16)
{
    return is_bf16 && isa->k_of_bf16 > 1;
}

/* Bytes of a packed weight [O, K]. */
int64_t collegium_packed_bytes(int64_t O, int64_t K, int is_bf16)
{
    return panels(O) * isa->width * padded(K, is_bf16) * (is_bf16 ? 2 : 4);
}

/* Pack `from` [O, K], contiguous. */
void collegium_pack(void *to, const void *from, int64_t O, int64_t K, int is_bf16)
{
    isa->pack(to, from, O, K, is_bf16);
}

struct peak {
    int64_t rounds;
    int is_bf16;
    double done[64];
};

static void peak_task(const void *at, int64_t task)
{
    struct peak *peak = (struct peak *)at;
#if defined(__x86_64__)
    if (isa == &isa_amx && !peak->is_bf16) { /* which float32 is computed by */
        peak->done[task] = peak_avx512(peak->rounds);
        return;
    }
#endif
    peak->done[task] = isa->peak(peak->rounds);
}

/* How many floating-point operations the units in use do at most, without memory: the number that was done by so many threads, at
 * most 64, in rounds. Who calls measures the time. */
double collegium_peak(int64_t rounds, int is_bf16, int num_threads)
{
    struct peak peak = {rounds, is_bf16, {0}};
    double total = 0;
    run_all(num_threads, peak_task, &peak, num_threads, 0);
    for (int i = 0; i < num_threads; i++)
        total += peak.done[i];
    return total;
}

/* to [n] float32 = from [n] bfloat16 */
void collegium_widen(float *to, const uint16_t *from, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        to[i] = from_bf16(from[i]);
}

struct split {
    const void *job;
    int64_t num_panels, per_task, tasks_per_group;
};

static void linear_task(const void *at, int64_t task)
{
    const struct split *split = at;
    int64_t begin = task * split->per_task, end = begin + split->per_task;
    isa->linear(split->job, begin, end < split->num_panels ? end : split->num_panels);
}

static struct split divide(const void *job, int64_t outputs, int64_t K, int is_bf16)
{
    struct split split = {.job = job, .num_panels = panels(outputs)};
    int64_t panel_bytes = isa->width * padded(K, is_bf16) * (is_bf16 ? 2 : 4);
    split.per_task = TASK_BYTES / (panel_bytes + 1) + 1;
    split.tasks_per_group = (split.num_panels + split.per_task - 1) / split.per_task;
    return split;
}

#if defined(__x86_64__)
enum { NARROWED_AT_ONCE = 32 };

struct narrowing { /* to: tiles of rows of x, of which the nth is the pair_rows[n]th where pair_rows is not NULL */
    const float *x; /* or, where it is narrow already: */
    const uint16_t *narrow;
    int64_t x_stride;
    const int64_t *pair_rows;
    uint16_t *to;
    int64_t R, K;
};

/* Memory for tiles of R rows, or NULL. */
static uint16_t *narrow_rows(int64_t R, int64_t K)
{
    return take_scratch((size_t)((R + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS * padded(K, 1) * 2));
}

static void narrowing_task(const void *at, int64_t task)
{
    const struct narrowing *job = at;
    int64_t begin = task * NARROWED_AT_ONCE, end = begin + NARROWED_AT_ONCE, blocks = padded(job->K, 1) / TILE_K;
    for (int64_t r = begin; r < end && r < job->R; r++) {
        int64_t row = job->pair_rows ? job->pair_rows[r] : r;
        uint16_t *to = in_tiles(job->to, r, blocks);
        if (job->narrow)
            amx_copy(to, job->narrow + row * job->x_stride, job->K);
        else
            amx_narrow(to, job->x + row * job->x_stride, job->K);
    }
}

static void run_narrowing(const struct narrowing *job, int num_threads)
{
    int64_t tasks = (job->R + NARROWED_AT_ONCE - 1) / NARROWED_AT_ONCE;
    run_all(tasks, narrowing_task, job, job->R * job->K < 1 << 17 ? 1 : num_threads, 1);
}
#endif

/* out [R, O] = x [R, K] @ weight.T + bias; rows of x and of out are so many numbers apart. */
static void run_linear(const float *x, int64_t x_stride, const void *weight, const void *bias, void *out, int64_t out_stride,
                       int64_t R, int64_t O, int64_t K, int is_bf16, int is_out_bf16, int num_threads)
{
    struct linear job = {x, x_stride, weight, bias, out, out_stride, R, O, K, is_bf16, is_out_bf16, NULL};
    struct split split = divide(&job, O, K, is_bf16);
    uint16_t *memory = NULL;
#if defined(__x86_64__)
    if (has_tiles(is_bf16)) {
        struct narrowing narrowing = {x, NULL, x_stride, NULL, memory = narrow_rows(R, K), R, K};
        if (!memory)
            abort(); /* half of what the rows themselves take */
        job.narrow = memory;
        run_narrowing(&narrowing, num_threads);
    }
#endif
    run_all(split.tasks_per_group, linear_task, &split, num_threads, 0);
    give_scratch(memory);
}

/* As run_linear, rows of out one after another. */
void collegium_linear(const float *x, int64_t x_stride, const void *weight, const void *bias, void *out, int64_t R,
                      int64_t O, int64_t K, int is_bf16, int is_out_bf16, int num_threads)
{
    run_linear(x, x_stride, weight, bias, out, O, R, O, K, is_bf16, is_out_bf16, num_threads);
}

static void gate_up_task(const void *at, int64_t task)
{
    const struct split *split = at;
    int64_t begin = task % split->tasks_per_group * split->per_task, end = begin + split->per_task;
    isa->gate_up(split->job, task / split->tasks_per_group, begin, end < split->num_panels ? end : split->num_panels);
}

static void down_task(const void *at, int64_t task)
{
    const struct split *split = at;
    int64_t begin = task % split->tasks_per_group * split->per_task, end = begin + split->per_task;
    isa->down(split->job, task / split->tasks_per_group, begin, end < split->num_panels ? end : split->num_panels);
}

#if defined(__x86_64__)
struct gathering {
    const struct experts *job;
    const uint16_t *narrow;
    int64_t stride;
};

static void gathering_task(const void *at, int64_t g)
{
    const struct gathering *gathering = at;
    const struct experts *job = gathering->job;
    struct narrowing rows = {job->x, gathering->narrow, job->shape->D, job->pair_rows + job->starts[g],
                             job->narrow + job->places[g] * gathering->stride, job->counts[g], job->shape->D};
    for (int64_t task = 0; task * NARROWED_AT_ONCE < rows.R; task++)
        narrowing_task(&rows, task);
}
/* An expert with all its rows, from gathering them to their y, by one thread: what lies between is in its own cache. */
struct alone {
    const struct gathering *gathering;
    const int64_t *order; /* the one with the most rows first */
};

static void alone_task(const void *at, int64_t task)
{
    const struct alone *alone = at;
    const struct experts *job = alone->gathering->job;
    int64_t g = alone->order[task];
    gathering_task(alone->gathering, g);
    isa->gate_up(job, g, 0, panels(job->shape->F));
    isa->down(job, g, 0, panels(job->shape->D));
}

enum { ROWS_ALONE = 24, EXPERTS_A_THREAD = 4 };

/* Whether experts are divided among threads, and not each expert: where they are many, and of many rows, of which none has so large
 * a part that others would wait for it. */
static int are_alone(const int64_t *counts, int64_t G, int num_threads)
{
    int64_t total = 0, most = 0;
    for (int64_t g = 0; g < G; g++) {
        total += counts[g];
        most = counts[g] > most ? counts[g] : most;
    }
    return num_threads > 1 && G >= EXPERTS_A_THREAD * num_threads && total >= ROWS_ALONE * G && most * num_threads * 2 <= total;
}

/* Groups by falling count. */
static void order_groups(const int64_t *counts, int64_t G, int64_t *order)
{
    for (int64_t g = 0; g < G; g++) {
        int64_t at = g;
        for (; at > 0 && counts[order[at - 1]] < counts[g]; at--)
            order[at] = order[at - 1];
        order[at] = g;
    }
}

#endif

/* As collegium_experts. narrow: x as bfloat16, where that is what the kernels read; x is not then. */
static int compute_experts(const struct expert_shape *shape, const float *x, const uint16_t *narrow, const int64_t *pair_rows,
                            const int64_t *starts, const int64_t *counts, const void *const *weights, int64_t G,
                            float *hidden, float *y, int num_threads)
{
    struct experts job = {shape, x, pair_rows, starts, counts, weights, hidden, y, NULL, NULL, NULL};
    int64_t *places = NULL;
    int is_done = 0;
#if defined(__x86_64__)
    if (has_tiles(shape->is_bf16)) { /* what each group reads, one row after another's */
        int64_t stride = padded(shape->D, 1), P = 0;
        places = malloc(2 * (size_t)G * sizeof *places);
        for (int64_t g = 0; places && g < G; P += (counts[g++] + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS)
            places[g] = P;
        job.narrow = narrow_rows(P, shape->D);
        job.narrow_hidden = narrow_rows(P, shape->F);
        job.places = places;
        if (!places || !job.narrow || !job.narrow_hidden) {
            free(places);
            give_scratch(job.narrow);
            give_scratch(job.narrow_hidden);
            return -1;
        }
        struct gathering gathering = {&job, narrow, stride};
        is_done = are_alone(counts, G, num_threads);
        if (is_done) {
            struct alone alone = {&gathering, places + G};
            order_groups(counts, G, places + G);
            run_all(G, alone_task, &alone, num_threads, 0);
        } else
            run_all(G, gathering_task, &gathering, P * stride < 1 << 17 ? 1 : num_threads, 1);
    }
#else
    (void)narrow;
#endif
    if (!is_done) {
        struct split split = divide(&job, shape->F, (1 + (shape->is_gated != 0)) * shape->D, shape->is_bf16);
        run_all(split.tasks_per_group * G, gate_up_task, &split, num_threads, 1);
        split = divide(&job, shape->D, shape->F, shape->is_bf16);
        run_all(split.tasks_per_group * G, down_task, &split, num_threads, 0);
        atomic_store(&pool.has_more, 0); /* also where the second part had no use for helpers */
    }
    free(places);
    give_scratch(job.narrow);
    give_scratch(job.narrow_hidden);
    return 0;
}

/* y of the pairs of G groups: group g computes pairs starts[g] .. + counts[g] with the expert at weights[g]. x [R, D];
 * pair_rows [P] index into x; hidden [P, F] is scratch; y [P, D]. Returns 0, or -1 where memory lacks. */
int collegium_experts(const struct expert_shape *shape, const float *x, const int64_t *pair_rows, const int64_t *starts,
                       const int64_t *counts, const void *const *weights, int64_t G, float *hidden, float *y,
                       int num_threads)
{
    return compute_experts(shape, x, NULL, pair_rows, starts, counts, weights, G, hidden, y, num_threads);
}

struct sum {
    const float *y, *pair_weights;
    const int64_t *first, *order;
    void *out;
    int64_t R, D;
    int is_bf16;
};

enum { SUM_ROWS = 16, SUM_COLUMNS = 128 };

static void sum_task(const void *at, int64_t task)
{
    const struct sum *job = at;
    int64_t begin = task * SUM_ROWS, end = begin + SUM_ROWS < job->R ? begin + SUM_ROWS : job->R;
    for (int64_t r = begin; r < end; r++)
        for (int64_t c = 0; c < job->D; c += SUM_COLUMNS) {
            int64_t n = job->D - c < SUM_COLUMNS ? job->D - c : SUM_COLUMNS;
            if (job->is_bf16) {
                float total[SUM_COLUMNS] = {0};
                for (int64_t i = job->first[r]; i < job->first[r + 1]; i++) {
                    const float *y = job->y + job->order[i] * job->D + c, w = job->pair_weights[job->order[i]];
                    for (int64_t d = 0; d < n; d++)
                        total[d] += y[d] * w;
                }
                for (int64_t d = 0; d < n; d++)
                    ((uint16_t *)job->out)[r * job->D + c + d] = to_bf16(total[d]);
            } else {
                double total[SUM_COLUMNS] = {0};
                for (int64_t i = job->first[r]; i < job->first[r + 1]; i++) {
                    const float *y = job->y + job->order[i] * job->D + c;
                    double w = job->pair_weights[job->order[i]];
                    for (int64_t d = 0; d < n; d++)
                        total[d] += (double)y[d] * w; /* exact products: fused or not, the same */
                }
                for (int64_t d = 0; d < n; d++)
                    ((float *)job->out)[r * job->D + c + d] = (float)total[d];
            }
        }
}

/* out [R, D] = for each row the sum of its pairs' y times their weights, in the order of the pairs; float64 sums for
 * float32 rows, float32 sums for bfloat16. Returns 0, or -1 where memory lacks. */
int collegium_sum(const float *y, const int64_t *pair_rows, const float *pair_weights, int64_t P, void *out, int64_t R,
                  int64_t D, int is_bf16, int num_threads)
{
    int64_t *first = calloc(R + 2 + P, sizeof *first), *order = first + R + 2;
    if (!first)
        return -1;
    for (int64_t p = 0; p < P; p++)
        first[pair_rows[p] + 2]++;
    for (int64_t r = 0; r < R; r++)
        first[r + 2] += first[r + 1];
    for (int64_t p = 0; p < P; p++) /* leaves first[r + 1] at the end of row r */
        order[first[pair_rows[p] + 1]++] = p;
    struct sum job = {y, pair_weights, first, order, out, R, D, is_bf16};
    run_all((R + SUM_ROWS - 1) / SUM_ROWS, sum_task, &job, R * D < 1 << 16 ? 1 : num_threads, 0);
    free(first);
    return 0;
}

/* Everything for a batch whose experts are all there: out [R, D] = the weighted sums of x [R, D], both of the shape's
 * type. counts [G] of pairs by group, pair_rows and pair_weights [P]. Returns 0, or -1 where memory lacks. */
int collegium_serve(const struct expert_shape *shape, const void *x, int64_t R, const int64_t *pair_rows,
                    const float *pair_weights, int64_t P, const int64_t *counts, const void *const *weights, int64_t G,
                    void *out, int num_threads)
{
    int is_narrow = has_tiles(shape->is_bf16);
    int64_t D = shape->D, wide = shape->is_bf16 && !is_narrow ? R * D : 0;
    int64_t *starts = take_scratch(G * sizeof *starts + (wide + P * (D + (is_narrow ? 0 : shape->F))) * sizeof(float));
    if (!starts)
        return -1;
    float *rows = (float *)(starts + G), *y = rows + wide, *hidden = is_narrow ? NULL : y + P * D;
    if (wide)
        collegium_widen(rows, x, wide);
    for (int64_t g = 0, at = 0; g < G; at += counts[g++])
        starts[g] = at;
    int failed = compute_experts(shape, wide ? rows : x, is_narrow ? x : NULL, pair_rows, starts, counts, weights, G, hidden,
                                 y, num_threads) ||
                 collegium_sum(y, pair_rows, pair_weights, P, out, R, D, shape->is_bf16, num_threads);
    give_scratch(starts);
    return failed ? -1 : 0;
}

#include "decoder.h"

/* --- dispatch --- */

/* Split T x K choices by worker, then expert, then token. Negative ids are no choice. worker_of [E], or workers [T, K]
 * for each choice. For each worker in turn, all in the same arrays: sizes [W, 3] its rows, groups and pairs; tokens, its
 * rows' tokens, rising; experts and counts, its groups; pair_rows and pair_weights, its pairs by group. scratch holds
 * W * E + T + 1 numbers. Returns the number of pairs, or -1 where an id or a worker is out of range. */
int64_t collegium_plan(const int64_t *ids, const float *weights, const int64_t *worker_of, const int64_t *workers,
                       int64_t T, int64_t K, int64_t E, int64_t W, int64_t *sizes, int64_t *tokens, uint16_t *experts,
                       uint16_t *counts, uint32_t *pair_rows, float *pair_weights, int64_t *scratch)
{
    int64_t *at = scratch, *row_of = scratch + W * E + 1, N = 0;
    memset(at, 0, (W * E + 1) * sizeof *at);
    memset(sizes, 0, 3 * W * sizeof *sizes);
    for (int64_t i = 0; i < T * K; i++) {
        if (ids[i] < 0)
            continue;
        if (ids[i] >= E)
            return -1;
        int64_t worker = workers ? workers[i] : worker_of[ids[i]];
        if (worker < 0 || worker >= W)
            return -1;
        at[worker * E + ids[i] + 1]++;
        N++;
    }
    int64_t group = 0;
    for (int64_t key = 0; key < W * E; key++) {
        int64_t count = at[key + 1];
        if (count) {
            experts[group] = (uint16_t)(key % E);
            counts[group++] = (uint16_t)count;
            sizes[3 * (key / E) + 1]++;
            sizes[3 * (key / E) + 2] += count;
        }
        at[key + 1] += at[key];
    }
    for (int64_t t = 0; t < T; t++) /* tokens first, rows of the worker when they are known */
        for (int64_t k = 0; k < K; k++) {
            int64_t i = t * K + k;
            if (ids[i] < 0)
                continue;
            int64_t place = at[(workers ? workers[i] : worker_of[ids[i]]) * E + ids[i]]++;
            pair_rows[place] = (uint32_t)t;
            pair_weights[place] = weights[i];
        }
    for (int64_t worker = 0, pair = 0, row = 0; worker < W; worker++) {
        int64_t end = pair + sizes[3 * worker + 2], first = row;
        if (pair == end)
            continue;
        memset(row_of, 0, T * sizeof *row_of);
        for (int64_t p = pair; p < end; p++)
            row_of[pair_rows[p]] = 1;
        for (int64_t t = 0; t < T; t++)
            if (row_of[t]) {
                row_of[t] = row - first;
                tokens[row++] = t;
            }
        sizes[3 * worker] = row - first;
        for (; pair < end; pair++)
            pair_rows[pair] = (uint32_t)row_of[pair_rows[pair]];
    }
    return N;
}

/* Choose a worker for each of T x K choices where M experts have several homes: copied [M] names them, their homes are
 * homes[starts[m]] to homes[starts[m + 1] - 1]. counts [E]: choices of each expert in this step. The rules are those of
 * choose_in_python in router_svc/routing.py, step by step. Writes workers [T, K] where any of the M was chosen; returns
 * how many of them were. work [W], visits [T, W], order [M + W] and given [E] are scratch. */
int64_t collegium_choose_replicas(const int64_t *ids, const int64_t *counts, const int64_t *worker_of, const int64_t *copied,
                         const int64_t *starts, const int64_t *homes, int64_t M, int64_t T, int64_t K, int64_t E,
                         int64_t W, double activation, int64_t *workers, double *work, uint8_t *visits, int64_t *order,
                         uint8_t *given)
{
    int64_t active = 0;
    memset(given, 0, E);
    for (int64_t m = 0; m < M; m++) {
        int64_t expert = copied[m], at = active;
        if (!counts[expert])
            continue;
        given[expert] = 1;
        for (; at > 0; at--) { /* by falling count, then by rising number */
            int64_t before = copied[order[at - 1]];
            if (counts[before] > counts[expert] || (counts[before] == counts[expert] && before < expert))
                break;
            order[at] = order[at - 1];
        }
        order[at] = m;
        active++;
    }
    if (!active)
        return 0;
    for (int64_t w = 0; w < W; w++)
        work[w] = 0;
    for (int64_t e = 0; e < E; e++)
        if (counts[e] && !given[e])
            work[worker_of[e]] += counts[e] + activation;
    memset(visits, 0, T * W);
    for (int64_t i = 0; i < T * K; i++) {
        if (ids[i] < 0)
            continue;
        workers[i] = worker_of[ids[i]];
        if (!given[ids[i]])
            visits[i / K * W + workers[i]] = 1;
    }
    int64_t *sorted = order + M;
    for (int64_t a = 0; a < active; a++) {
        int64_t m = order[a], expert = copied[m], count = counts[expert], num_homes = starts[m + 1] - starts[m];
        double cost = count + activation, highest = work[0];
        for (int64_t w = 1; w < W; w++)
            highest = work[w] > highest ? work[w] : highest;
        for (int64_t h = 0; h < num_homes; h++) { /* the idlest first */
            int64_t home = homes[starts[m] + h], at = h;
            for (; at > 0 && work[sorted[at - 1]] > work[home]; at--)
                sorted[at] = sorted[at - 1];
            sorted[at] = home;
        }
        double least = work[sorted[0]] + cost, busiest = highest > least ? highest : least;
        int64_t parts = 1;
        double best = highest > work[sorted[0]] + count + activation ? highest : work[sorted[0]] + count + activation;
        double total = work[sorted[0]];
        for (int64_t p = 2; p <= num_homes; p++) {
            total += work[sorted[p - 1]];
            double level = (total + count + p * activation) / p;
            if (level - work[sorted[p - 1]] < 2 * activation) /* the last part is not worth reading the expert for */
                break;
            double most = highest > level ? highest : level;
            if (most < best) {
                parts = p;
                best = most;
            }
        }
        if (parts == 1) {
            int64_t home = -1, most = -1;
            for (int64_t h = 0; h < num_homes; h++) {
                int64_t w = sorted[h], overlap = 0;
                if (work[w] + cost > busiest)
                    continue;
                for (int64_t i = 0; i < T * K; i++)
                    if (ids[i] == expert)
                        overlap += visits[i / K * W + w];
                if (overlap > most || (overlap == most && (work[w] < work[home] || (work[w] == work[home] && w < home)))) {
                    home = w;
                    most = overlap;
                }
            }
            for (int64_t i = 0; i < T * K; i++)
                if (ids[i] == expert) {
                    workers[i] = home;
                    visits[i / K * W + home] = 1;
                }
            work[home] += cost;
            continue;
        }
        double level = 0;
        for (int64_t p = 0; p < parts; p++)
            level += work[sorted[p]];
        level = (level + count + parts * activation) / parts;
        int64_t i = 0, begin = 0;
        for (int64_t p = 0; p < parts; p++) {
            int64_t home = sorted[p], end = count;
            if (p < parts - 1) {
                int64_t share = (int64_t)nearbyint(level - work[home] - activation);
                end = begin + (share > 0 ? share : 0);
                end = end < count ? end : count;
            }
            for (int64_t left = end - begin; left > 0; i++)
                if (ids[i] == expert) {
                    workers[i] = home;
                    visits[i / K * W + home] = 1;
                    left--;
                }
            work[home] += end - begin + activation * (end > begin);
            begin = end;
        }
    }
    return active;
}
