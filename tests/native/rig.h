/* Declarations of what the checks call, and a small worker with three layers of four experts. */

#ifndef COLLEGIUM_RIG_H
#define COLLEGIUM_RIG_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../../collegium/native/frame.h"

struct worker_end;
struct link;
struct slot;
struct shape { /* as kernels.c has it */
    int64_t D, F;
    int32_t is_bf16, has_bias, activation, is_gated;
    float clamp, alpha;
    int64_t up_at, down_at, gate_up_bias_at, down_bias_at;
};

int collegium_choose(int most);
int64_t collegium_packed_bytes(int64_t O, int64_t K, int is_bf16);
void collegium_pack(void *to, const void *from, int64_t O, int64_t K, int is_bf16);
struct worker_end *collegium_end_new(int control_fd, int64_t budget, int64_t frame_ns, int64_t reader_ns, int64_t *totals);
void collegium_end_free(struct worker_end *e);
int collegium_end_serve(struct worker_end *e, const void *shape, const void *const *weights, uint8_t *leases,
                        const int64_t *num_experts, int64_t L, int64_t E, int64_t D, int dtype, int num_threads,
                        int notes_visits);
struct link *collegium_end_add(struct worker_end *e, int fd, int64_t id, const int64_t *agreed, int64_t sent_us,
                               int64_t received_us, int64_t *stats);
void collegium_end_remove(struct worker_end *e, struct link *link);
void collegium_end_say(struct link *link, const uint8_t *frame, int64_t bytes);
void collegium_end_progress(struct worker_end *e);
int collegium_end_move(struct worker_end *e, int64_t wait_ns);
int collegium_end_run(struct worker_end *e, int64_t until_ns, int is_waiting);
void collegium_end_batch(const struct worker_end *e, int64_t *out);
void collegium_end_answer(struct worker_end *e, const uint8_t *y, const uint16_t *missed, int64_t num_missed,
                          int64_t began_ns, int64_t ended_ns);
void collegium_end_fail(struct worker_end *e, int status, const char *text, int64_t text_bytes);
void collegium_end_split(struct worker_end *e);
struct slot *collegium_end_take(struct worker_end *e, int only_odd, int64_t *out);
void collegium_end_reply(struct worker_end *e, struct slot *slot, int status, const uint8_t *y, const uint16_t *missed,
                         int64_t num_missed, int64_t compute_us, int64_t wait_us, const char *text, int64_t text_bytes);
int collegium_end_reason(const struct link *link, int64_t *error, uint8_t *head);
int64_t collegium_end_hint_body(const struct link *link, const uint8_t **body);
int collegium_end_hint(struct worker_end *e, int64_t *out);
void collegium_end_noted(const struct worker_end *e, int64_t *out);
void collegium_end_drained(struct worker_end *e);
int64_t collegium_end_used(const struct worker_end *e);

enum { CONTROL = 1, ENDED = 2, HINTS = 4, BATCH = 8, ARRIVED = 16, FULL = 32 };
enum { L = 3, E = 4, D = 16, F = 16, MAX_ROWS = 24, MAX_PAIRS = 64, CREDITS = 3, FLOAT32 = 1, TOTALS = 15, STATS = 9 };

#define MUST(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what); \
            abort(); \
        } \
    } while (0)

struct experts_rig {
    struct shape shape;
    uint8_t *memory[L * E];
    const void *table[L * E];
    uint8_t leases[L * E];
};

/* Expert i of layer l is a multiple of one map, so that what a dispatch gives can be known from another. */
static inline void make_experts(struct experts_rig *rig)
{
    static const float step[] = {0.25f, 0.5f, -0.25f, 1.0f};
    int64_t up = (collegium_packed_bytes(F, D, 0) + 63) & ~63, down = (collegium_packed_bytes(D, F, 0) + 63) & ~63;
    rig->shape = (struct shape){.D = D, .F = F, .up_at = up, .down_at = 2 * up};
    for (int at = 0; at < L * E; at++) {
        float map[D * F];
        for (int i = 0; i < D * F; i++)
            map[i] = step[at % E] * (float)((i * 7 + at / E) % 5 - 2);
        MUST(!posix_memalign((void **)&rig->memory[at], 64, (size_t)(2 * up + down)));
        collegium_pack(rig->memory[at], map, F, D, 0);
        collegium_pack(rig->memory[at] + up, map, F, D, 0);
        collegium_pack(rig->memory[at] + 2 * up, map, D, F, 0);
        rig->table[at] = rig->memory[at];
    }
}

static inline void free_experts(struct experts_rig *rig)
{
    for (int at = 0; at < L * E; at++)
        free(rig->memory[at]);
}

static const int64_t AGREED[] = {D, 4, 4, FLOAT32, FLOAT32, MAX_ROWS, MAX_PAIRS, MAX_PAIRS, CREDITS, 0};

/* Write a dispatch of `rows` rows that each chose the experts of a mask; returns its bytes. */
static inline int64_t write_dispatch(uint8_t *at, uint64_t seq, int layer, int rows, int mask, int text, int64_t deadline_us)
{
    int groups = __builtin_popcount((unsigned)mask), pairs = groups * rows;
    int64_t body = 4 * groups + 8 * pairs + (int64_t)rows * D * 4 + text;
    memset(at, 0, HEADER_BYTES);
    put(at + AT_MAGIC, MAGIC, 2);
    at[AT_VERSION] = VERSION;
    at[AT_KIND] = DISPATCH;
    at[AT_DTYPE] = FLOAT32;
    put(at + AT_SEQ, seq, 8);
    put(at + AT_BODY, (uint64_t)body, 4);
    put(at + AT_TEXT, (uint64_t)text, 2);
    put(at + AT_LAYER, (uint64_t)layer, 2);
    put(at + AT_DEADLINE_US, (uint64_t)deadline_us, 8);
    put(at + AT_ROWS, (uint64_t)rows, 4);
    put(at + AT_PAIRS, (uint64_t)pairs, 4);
    put(at + AT_GROUPS, (uint64_t)groups, 2);
    put(at + AT_SENT_US, (uint64_t)(now_ns() / 1000), 8);
    uint8_t *to = at + HEADER_BYTES;
    for (int e = 0; e < E; e++)
        if (mask >> e & 1)
            put(to, (uint64_t)e, 2), to += 2;
    for (int g = 0; g < groups; g++)
        put(to, (uint64_t)rows, 2), to += 2;
    for (int g = 0; g < groups; g++)
        for (int r = 0; r < rows; r++)
            put(to, (uint64_t)r, 4), to += 4;
    for (int p = 0; p < pairs; p++, to += 4) {
        float weight = 0.5f;
        memcpy(to, &weight, 4);
    }
    for (int i = 0; i < rows * D; i++, to += 4) {
        float x = (float)(i % 7) - 3;
        memcpy(to, &x, 4);
    }
    memset(to, 'a', (size_t)text);
    return HEADER_BYTES + body;
}

static inline int64_t write_hint(uint8_t *at, int layer, int mask)
{
    int groups = __builtin_popcount((unsigned)mask);
    memset(at, 0, HEADER_BYTES);
    put(at + AT_MAGIC, MAGIC, 2);
    at[AT_VERSION] = VERSION;
    at[AT_KIND] = HINT;
    put(at + AT_BODY, (uint64_t)(4 * groups), 4);
    put(at + AT_LAYER, (uint64_t)layer, 2);
    put(at + AT_GROUPS, (uint64_t)groups, 2);
    uint8_t *to = at + HEADER_BYTES;
    for (int e = 0; e < E; e++)
        if (mask >> e & 1)
            put(to, (uint64_t)e, 2), to += 2;
    for (int g = 0; g < groups; g++)
        put(to, 1, 2), to += 2;
    return HEADER_BYTES + 4 * groups;
}

#endif
