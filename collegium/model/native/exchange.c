/* Both ends of a link where nothing disturbs it. A router's: one layer's way to the workers and back, plan, send, count,
 * receive, sum. A worker's: dispatches whose experts are all there are read, computed and answered.
 *
 * Owns no connection: the caller lends descriptors of links that are idle and open, and takes them back. Whatever is out
 * of the ordinary (a frame that is no good reply or dispatch, one that is late, a peer that has gone) is left unread, so
 * that the caller goes on where this stopped. Frames are those of collegium/link/header.py. Linux. */

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <poll.h>
#include <sched.h>

#define HEADER_BYTES 64
#define DISPATCH 3
#define REPLY 4
#define HINT 7
#define MOST_HINTS 32 /* that are passed over before others have their turn; fewer than looks */
#define SPINS 200 /* looks for the rest of a frame whose header is here */

int64_t collegium_plan(const int64_t *ids, const float *weights, const int64_t *worker_of, const int64_t *workers,
                       int64_t T, int64_t K, int64_t E, int64_t W, int64_t *sizes, int64_t *tokens, uint16_t *experts,
                       uint16_t *counts, uint32_t *pair_rows, float *pair_weights, int64_t *scratch);

enum state { UNSENT, SENT, DONE, BROKEN };

struct exchange {
    const int32_t *fds; /* [W] */
    int64_t W, E, K, D, item_bytes;
    /* of this call */
    int64_t T, num_decode;
    const int64_t *ids, *worker_of, *workers;
    const float *weights;
    const uint8_t *x;
    uint8_t *out; /* [T, D] */
    int64_t *decode, *prefill, *activations; /* [E], counted up; NULL: counted already */
    uint64_t seq, deadline_us, epoch; /* worker w's dispatch has number seq + w */
    uint32_t step;
    uint16_t magic, layer;
    uint8_t version, dtype;
    uint8_t unused[6];
    /* the plan, as collegium_plan writes it */
    int64_t *sizes, *tokens, *scratch;
    uint16_t *experts, *counts;
    uint32_t *pair_rows;
    float *pair_weights;
    /* memory: rows as they are sent and as they come back, those of one worker after another's; sums [T, D] in 8 bytes */
    uint8_t *gathered, *replies;
    void *sums;
    int32_t *states; /* [W] enum state */
    int64_t *totals; /* [W, 6] dispatches, rows, pairs, bytes out, rows back, bytes back: counted up */
    int64_t blocked_ns, away_ns; /* of this call */
    int64_t began_ns;            /* when its first dispatch was sent */
};

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

static void put(uint8_t *at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        at[i] = (uint8_t)(value >> (8 * i));
}

static uint64_t get(const uint8_t *at, int bytes)
{
    uint64_t value = 0;
    for (int i = 0; i < bytes; i++)
        value |= (uint64_t)at[i] << (8 * i);
    return value;
}

/* Send all of it; what the socket does not take at once may wait for so long. 0, or -1 where nothing has left, or -2. */
static int send_all(int fd, struct iovec *parts, int num_parts, int64_t left, int64_t limit_ns)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)num_parts};
    int64_t sent = 0, until = 0;
    while (left > 0) {
        ssize_t taken = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return sent ? -2 : -1;
        if (taken < 0) {
            if (!sent)
                return -1; /* the caller has better means to wait */
            if (!until)
                until = now_ns() + limit_ns;
            if (now_ns() > until)
                return -2;
            struct pollfd wait = {.fd = fd, .events = POLLOUT};
            poll(&wait, 1, 10);
            continue;
        }
        sent += taken;
        left -= taken;
        while (taken > 0 && message.msg_iovlen) {
            struct iovec *first = message.msg_iov;
            size_t part = (size_t)taken < first->iov_len ? (size_t)taken : first->iov_len;
            first->iov_base = (uint8_t *)first->iov_base + part;
            first->iov_len -= part;
            taken -= (ssize_t)part;
            if (!first->iov_len) {
                message.msg_iov++;
                message.msg_iovlen--;
            }
        }
    }
    return 0;
}

#define MOST_MISSES 4096

/* Take a good reply to `rows` rows of `groups` experts off the socket; the bytes of its list of misses, or -1 with nothing
 * taken, or -2 where the connection is of no use. What was missed is passed over: who asks for that goes the long way. */
static int64_t take_reply(const struct exchange *e, int fd, uint64_t seq, int64_t rows, int64_t groups, uint8_t *y)
{
    uint8_t head[HEADER_BYTES];
    uint16_t missed[MOST_MISSES];
    for (int spin = 0; spin < SPINS; spin++) {
        ssize_t seen = recv(fd, head, sizeof head, MSG_PEEK); /* waits as long as the socket's own limit says */
        if (seen < 0 && errno == EINTR)
            continue;
        if (seen <= 0)
            return -1;
        if (seen < HEADER_BYTES) {
            sched_yield();
            continue;
        }
        int64_t num_missed = (int64_t)get(head + 32, 4), row_bytes = rows * e->D * e->item_bytes;
        int64_t body = row_bytes + 2 * num_missed;
        if (get(head, 2) != e->magic || head[2] != e->version || head[3] != REPLY || head[4] || head[5] != e->dtype ||
            get(head + 8, 8) != seq || num_missed > groups || num_missed > MOST_MISSES ||
            get(head + 16, 4) != (uint64_t)body || get(head + 36, 4) != (uint64_t)rows)
            return -1;
        int here = 0;
        if (ioctl(fd, FIONREAD, &here) < 0)
            return -1;
        if (here < HEADER_BYTES + body) {
            sched_yield();
            continue;
        }
        struct iovec parts[3] = {{head, HEADER_BYTES}, {y, (size_t)row_bytes}, {missed, 2 * (size_t)num_missed}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
        ssize_t taken = recvmsg(fd, &message, MSG_WAITALL);
        return taken == HEADER_BYTES + body ? 2 * num_missed : -2;
    }
    return -1;
}

/* Sum the workers' rows into their tokens, workers in their order: in double for float, in float for bfloat16. */
static void sum_replies(const struct exchange *e)
{
    int64_t n = e->T * e->D, row = 0, only = -1, num = 0;
    for (int64_t w = 0; w < e->W; w++)
        if (e->sizes[3 * w]) {
            only = w;
            num++;
        }
    if (num == 1 && e->sizes[3 * only] == e->T) {
        memcpy(e->out, e->replies, n * e->item_bytes);
        return;
    }
    if (e->item_bytes == 4) {
        double *total = e->sums;
        memset(total, 0, n * sizeof *total);
        for (int64_t w = 0; w < e->W; w++)
            for (int64_t r = 0; r < e->sizes[3 * w]; r++, row++) {
                const float *y = (const float *)e->replies + row * e->D;
                double *at = total + e->tokens[row] * e->D;
                for (int64_t d = 0; d < e->D; d++)
                    at[d] += y[d];
            }
        for (int64_t i = 0; i < n; i++)
            ((float *)e->out)[i] = (float)total[i];
        return;
    }
    float *total = e->sums;
    memset(total, 0, n * sizeof *total);
    for (int64_t w = 0; w < e->W; w++)
        for (int64_t r = 0; r < e->sizes[3 * w]; r++, row++) {
            const uint16_t *y = (const uint16_t *)e->replies + row * e->D;
            float *at = total + e->tokens[row] * e->D;
            for (int64_t d = 0; d < e->D; d++) {
                uint32_t bits = (uint32_t)y[d] << 16;
                float value;
                memcpy(&value, &bits, sizeof value);
                at[d] += value;
            }
        }
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, total + i, sizeof bits);
        if ((bits & 0x7fffffff) > 0x7f800000)
            ((uint16_t *)e->out)[i] = (uint16_t)(bits >> 16 | 0x40); /* NaN stays NaN */
        else
            ((uint16_t *)e->out)[i] = (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

static void count(const struct exchange *e)
{
    if (!e->decode)
        return;
    for (int64_t i = 0; i < e->T * e->K; i++)
        if (e->ids[i] >= 0)
            (i / e->K < e->num_decode ? e->decode : e->prefill)[e->ids[i]]++;
    int64_t groups = 0;
    for (int64_t w = 0; w < e->W; w++)
        groups += e->sizes[3 * w + 1];
    for (int64_t g = 0; g < groups; g++) /* without copies, an expert is one group */
        e->activations[e->experts[g]]++;
}

/* Plan a layer and send each worker its dispatch. 0: all are on their way. 1: something was out of the ordinary, and states
 * says how far each worker's dispatch has come. -1: an id or a worker is out of range, and nothing was done. */
int collegium_send(struct exchange *e)
{
    int64_t num_pairs = collegium_plan(e->ids, e->weights, e->worker_of, e->workers, e->T, e->K, e->E, e->W, e->sizes,
                                       e->tokens, e->experts, e->counts, e->pair_rows, e->pair_weights, e->scratch);
    if (num_pairs < 0)
        return -1;
    int64_t row_bytes = e->D * e->item_bytes, row = 0, group = 0, pair = 0;
    int is_whole = 1;
    e->began_ns = now_ns();
    for (int64_t w = 0; w < e->W; w++) {
        int64_t rows = e->sizes[3 * w], groups = e->sizes[3 * w + 1], pairs = e->sizes[3 * w + 2], prompts = 0;
        e->states[w] = UNSENT;
        if (!pairs)
            continue;
        const uint8_t *x = e->x;
        if (rows < e->T) {
            uint8_t *gathered = e->gathered + row * row_bytes;
            for (int64_t r = 0; r < rows; r++)
                memcpy(gathered + r * row_bytes, e->x + e->tokens[row + r] * row_bytes, row_bytes);
            x = gathered;
        }
        for (int64_t r = 0; r < rows; r++)
            prompts += e->tokens[row + r] >= e->num_decode;
        int64_t body = 4 * groups + 8 * pairs + rows * row_bytes;
        uint8_t head[HEADER_BYTES] = {0};
        put(head, e->magic, 2);
        head[2] = e->version;
        head[3] = DISPATCH;
        head[5] = e->dtype;
        put(head + 8, (e->seq + (uint64_t)w) & 0xffffffff, 8);
        put(head + 16, (uint64_t)body, 4);
        put(head + 22, e->layer, 2);
        put(head + 24, e->deadline_us, 8);
        put(head + 32, e->epoch, 8);
        put(head + 40, e->step, 4);
        put(head + 44, (uint64_t)rows, 4);
        put(head + 48, (uint64_t)pairs, 4);
        put(head + 52, (uint64_t)groups, 2);
        put(head + 54, (uint64_t)prompts, 2);
        put(head + 56, (uint64_t)(now_ns() / 1000), 8);
        struct iovec parts[6] = {
            {head, HEADER_BYTES},
            {e->experts + group, 2 * (size_t)groups},
            {e->counts + group, 2 * (size_t)groups},
            {e->pair_rows + pair, 4 * (size_t)pairs},
            {e->pair_weights + pair, 4 * (size_t)pairs},
            {(void *)x, (size_t)(rows * row_bytes)},
        };
        int failed = send_all(e->fds[w], parts, 6, HEADER_BYTES + body, 2000000000);
        e->states[w] = !failed ? SENT : failed == -1 ? UNSENT : BROKEN;
        if (failed)
            is_whole = 0;
        else {
            int64_t *total = e->totals + 6 * w;
            total[0]++;
            total[1] += rows;
            total[2] += pairs;
            total[3] += HEADER_BYTES + body;
        }
        row += rows;
        group += groups;
        pair += pairs;
    }
    count(e);
    return !is_whole;
}

/* Receive what is on its way, from workers whose descriptors are there, and sum. 0: out is written. 1: as above. */
int collegium_receive(struct exchange *e)
{
    int64_t row_bytes = e->D * e->item_bytes, row = 0, waits = now_ns();
    int is_whole = 1;
    for (int64_t w = 0; w < e->W; w++) {
        int64_t rows = e->sizes[3 * w];
        if (e->states[w] == SENT && e->fds[w] >= 0) {
            int64_t missed_bytes = take_reply(e, e->fds[w], (e->seq + (uint64_t)w) & 0xffffffff, rows,
                                              e->sizes[3 * w + 1], e->replies + row * row_bytes);
            e->states[w] = missed_bytes >= 0 ? DONE : missed_bytes == -1 ? SENT : BROKEN;
            if (missed_bytes < 0)
                is_whole = 0;
            else {
                e->totals[6 * w + 4] += rows;
                e->totals[6 * w + 5] += HEADER_BYTES + rows * row_bytes + missed_bytes;
            }
        }
        is_whole &= !rows || e->states[w] == DONE;
        row += rows;
    }
    int64_t over = now_ns();
    e->blocked_ns = over - waits;
    e->away_ns = over - e->began_ns;
    if (!is_whole)
        return 1;
    sum_replies(e);
    return 0;
}

/* Have a layer's experts computed: what is sent is received, whatever else was out of the ordinary. Returns as above. */
int collegium_exchange(struct exchange *e)
{
    int sent = collegium_send(e);
    return sent < 0 ? sent : collegium_receive(e);
}

/* --- a whole step --- */

void collegium_qkv(const void *attention, const float *h, const float *cos, const float *sin, const int64_t *slots,
                   int64_t T, float *q, float *scratch, int num_threads);
void collegium_attend(const void *attention, const float *q, const int64_t *blocks, const int64_t *first_block,
                      const int64_t *lengths, int64_t B, float *attended, int num_threads);
void collegium_output(const void *attention, const float *attended, float *h, int64_t T, void *x, int64_t *ids,
                      float *weights, float *scratch, int num_threads);
void collegium_add(float *h, const void *y, int64_t n, int is_bf16);
void collegium_embed(float *h, const void *table, const int64_t *tokens, int64_t T, int64_t D, int is_bf16);
void collegium_norm_rows(void *x, const float *h, const float *weight, int64_t T, int64_t D, float eps, int is_bf16,
                         float *scratch);

int64_t collegium_choose_replicas(const int64_t *ids, const int64_t *counts, const int64_t *worker_of, const int64_t *copied,
                                  const int64_t *starts, const int64_t *homes, int64_t M, int64_t T, int64_t K, int64_t E,
                                  int64_t W, double activation, int64_t *workers, double *work, uint8_t *visits,
                                  int64_t *order, uint8_t *given);

struct copies { /* a layer's experts with several homes, [num]: those of the nth are homes[starts[n]] to homes[starts[n + 1]] */
    const int64_t *experts, *starts, *homes;
    int64_t num;
};

struct step {
    struct exchange *exchange;           /* its rows, ids, weights and sums are this step's; what is set by layer is not */
    const void *const *layers;           /* [L] struct attention */
    const int64_t *const *worker_of;     /* [L] -> [E] */
    int64_t L, timeout_us;
    int64_t *decode, *prefill, *activations; /* [L, E], counted up */
    const void *embedding;               /* [V, D] */
    const float *cos_table, *sin_table;  /* [positions, W] */
    const int64_t *tokens, *positions;   /* [T] */
    const float *final_norm;             /* [D] */
    float *h;                            /* [T, D] */
    float *cos, *sin;                    /* [T, W] */
    const int64_t *slots, *blocks, *first_block, *lengths;
    float *q, *attended, *scratch;
    int64_t layer; /* in: the first; out: the one that was disturbed, or L */
    int64_t blocked_ns, away_ns; /* of this call */
    int64_t num_threads, W;
    double eps;
    /* where copies is not NULL: memory to choose among them in */
    const struct copies *copies; /* [L] */
    double activation_rows;
    int64_t *workers, *counts, *order; /* [T, K], [E], [most copies + W] */
    double *work;                      /* [W] */
    uint8_t *visits, *given;           /* [T, W], [E] */
};

/* Count a layer's choices and choose among the homes of experts that have several. -1: a choice is out of range. */
static int choose(struct step *s, const struct copies *copies, int64_t *decode, int64_t *activations)
{
    struct exchange *e = s->exchange;
    memset(s->counts, 0, e->E * sizeof *s->counts);
    for (int64_t i = 0; i < e->T * e->K; i++) {
        if (e->ids[i] < 0 || e->ids[i] >= e->E)
            return -1;
        s->counts[e->ids[i]]++;
    }
    for (int64_t expert = 0; expert < e->E; expert++) {
        decode[expert] += s->counts[expert];
        activations[expert] += s->counts[expert] > 0;
    }
    int64_t active = collegium_choose_replicas(e->ids, s->counts, e->worker_of, copies->experts, copies->starts,
                                               copies->homes, copies->num, e->T, e->K, e->E, e->W, s->activation_rows,
                                               s->workers, s->work, s->visits, s->order, s->given);
    e->workers = active ? s->workers : NULL;
    e->decode = NULL; /* counted */
    return 0;
}

/* Compute a step of decode rows from its tokens to the rows for the head, e->x, experts included. 0: all is done. Else what
 * collegium_exchange said of `layer`, whose exchange tells the rest: nothing of its sums has been added to h. */
int collegium_step(struct step *s)
{
    struct exchange *e = s->exchange;
    int num_threads = (int)s->num_threads;
    int is_bf16 = e->item_bytes == 2;
    s->blocked_ns = s->away_ns = 0;
    if (!s->layer) {
        collegium_embed(s->h, s->embedding, s->tokens, e->T, e->D, is_bf16);
        for (int64_t t = 0; t < e->T; t++) {
            memcpy(s->cos + t * s->W, s->cos_table + s->positions[t] * s->W, s->W * sizeof *s->cos);
            memcpy(s->sin + t * s->W, s->sin_table + s->positions[t] * s->W, s->W * sizeof *s->sin);
        }
    }
    for (uint64_t seq = e->seq; s->layer < s->L; s->layer++, seq += (uint64_t)e->W) {
        const void *layer = s->layers[s->layer];
        collegium_qkv(layer, s->h, s->cos, s->sin, s->slots, e->T, s->q, s->scratch, num_threads);
        collegium_attend(layer, s->q, s->blocks, s->first_block, s->lengths, e->T, s->attended, num_threads);
        collegium_output(layer, s->attended, s->h, e->T, (void *)e->x, (int64_t *)e->ids, (float *)e->weights, s->scratch,
                         num_threads);
        int64_t offset = s->layer * e->E;
        e->decode = s->decode + offset;
        e->prefill = s->prefill + offset;
        e->activations = s->activations + offset;
        e->worker_of = s->worker_of[s->layer];
        e->workers = NULL;
        if (s->copies && s->copies[s->layer].num &&
            choose(s, s->copies + s->layer, s->decode + offset, s->activations + offset) < 0)
            return -1;
        e->seq = seq & 0xffffffff;
        e->deadline_us = (uint64_t)(now_ns() / 1000 + s->timeout_us);
        e->layer = (uint16_t)s->layer;
        int found = collegium_exchange(e);
        s->blocked_ns += e->blocked_ns;
        s->away_ns += e->away_ns;
        if (found)
            return found;
        collegium_add(s->h, e->out, e->T * e->D, is_bf16);
    }
    collegium_norm_rows((void *)e->x, s->h, s->final_norm, e->T, e->D, (float)s->eps, is_bf16, s->scratch);
    return 0;
}

/* --- a worker's end --- */

#define MOST_BODY (256 << 10) /* of a dispatch that is waited for here; sockets hold little more */

int collegium_serve(const void *shape, const void *x, int64_t R, const int64_t *pair_rows, const float *pair_weights,
                    int64_t P, const int64_t *counts, const void *const *weights, int64_t G, void *out, int num_threads);

enum outcome { OTHER, IDLE };
enum link_state { IS_IDLE, HOLDS, LEFT, OWES, BROKE }; /* the last three: for the caller to see to */

#define WAITS 0.5   /* of the time that a router takes from layer to layer; these as in expert_svc/join_wait.py */
#define LATE 1.25   /* an expected dispatch may take so much longer than usual */
#define ACTIVE 6.0  /* a router that has not been heard of for so many of its layers is idle */

struct lent_link { /* one link */
    /* memory: the part of a frame before its rows, the rows, its experts' weights as they were when it was read */
    uint8_t *front, *x;
    const void **weights; /* [max_groups] */
    int64_t offset_us;                    /* our clock minus the router's */
    int64_t last_layer, last_ns, layer_ns; /* where its router was met last, and how long it takes from layer to layer */
    /* the dispatch that it holds */
    int64_t rows, pairs, groups, layer, received_ns;
    /* what is said: the stamps of the frame that travelled least, totals, and of a reply that it owes the bytes sent */
    int64_t least_sent_us, least_received_us, dispatches, total_rows, total_pairs, bytes_out, bytes_back, sent_bytes;
    int64_t hints;
    int32_t fd, state;
    uint8_t head[HEADER_BYTES];
};

struct answer {
    const void *shape;          /* of an expert */
    const void *const *weights; /* [L, E] packed experts; NULL: not there. Others may write it */
    int64_t L, E, D, item_bytes, max_rows, max_pairs, max_groups;
    int64_t until_ns;
    struct lent_link *links;
    int64_t num_links;
    /* memory for all links' dispatches together: rows, sums, and what the kernels want wider than frames have it */
    uint8_t *x, *out;
    int64_t *pair_rows, *counts, *at; /* at [E] */
    float *pair_weights;
    const void **chosen, **found; /* [E] */
    /* where visits is not NULL: what was visited, one batch after another's: layer, when it began, decoding rows, groups,
     * then of each group its expert and how many decoding rows chose it */
    int64_t *visits, max_visits, num_visits, *of_decode; /* of_decode [E] */
    int64_t *log, max_log, num_log; /* [max_log, 4] link, layer, decoding rows, when received: where max_log is not 0 */
    int32_t epoll_fd, num_threads, is_waiting, unused;
    uint16_t magic;
    uint8_t version, dtype;
    int64_t batches, joined_batches, joined_dispatches, groups, compute_ns, wait_ns, join_wait_ns;
};

/* Pass over a good hint of experts that are all here: there is nothing to do about it. 1; or 0, with nothing taken. */
static int pass_hint(const struct answer *a, struct lent_link *link)
{
    uint8_t *head = link->front;
    int64_t groups = (int64_t)get(head + 52, 2), layer = (int64_t)get(head + 22, 2), size = HEADER_BYTES + 4 * groups;
    if (get(head, 2) != a->magic || head[2] != a->version || groups < 1 || groups > a->max_groups || layer >= a->L ||
        get(head + 16, 4) != 4 * (uint64_t)groups || recv(link->fd, head, size, MSG_PEEK | MSG_DONTWAIT) != size)
        return 0;
    const uint16_t *experts = (const uint16_t *)(head + HEADER_BYTES), *counts = experts + groups;
    for (int64_t g = 0; g < groups; g++) {
        if (experts[g] >= a->E || !counts[g] ||
            !__atomic_load_n(a->weights + layer * a->E + experts[g], __ATOMIC_ACQUIRE))
            return 0;
        a->at[experts[g]] = 0;
    }
    for (int64_t g = 0; g < groups; g++)
        if (a->at[experts[g]]++)
            return 0;
    if (recv(link->fd, head, size, MSG_WAITALL) != size)
        return 0;
    link->bytes_out += size;
    link->hints++;
    return 1;
}

/* Read one dispatch of a link into its memory: it HOLDS it then; it IS_IDLE where there was none, but hints of what is here.
 * Else it is LEFT, and of what comes next nothing was taken, or BROKE. */
static void take_dispatch(struct answer *a, struct lent_link *link, int64_t received_ns)
{
    int64_t rows = 0, pairs = 0, groups = 0, body = 0, front = 0;
    const int64_t most = HEADER_BYTES + 4 * a->max_groups + 8 * a->max_pairs;
    int is_here = 0, num_hints = 0;
    link->state = LEFT;
    for (int spin = 0; spin < SPINS && !is_here; spin++) {
        size_t wanted = (size_t)(front ? front : most < 4096 ? most : 4096);
        ssize_t seen = recv(link->fd, link->front, wanted, MSG_PEEK | MSG_DONTWAIT);
        if (seen < 0 && errno == EINTR)
            continue;
        if (seen < 0 && num_hints && (errno == EAGAIN || errno == EWOULDBLOCK))
            link->state = IS_IDLE;
        if (seen <= 0)
            return;
        if (seen < HEADER_BYTES) {
            sched_yield();
            continue;
        }
        const uint8_t *head = link->front;
        if (head[3] == HINT && pass_hint(a, link)) {
            front = 0;
            if (++num_hints < MOST_HINTS)
                continue; /* and look again for a dispatch */
            link->state = IS_IDLE; /* the others' turn, and the clock's */
            return;
        }
        rows = (int64_t)get(head + 44, 4), pairs = (int64_t)get(head + 48, 4), groups = (int64_t)get(head + 52, 2);
        body = (int64_t)get(head + 16, 4);
        front = HEADER_BYTES + 4 * groups + 8 * pairs;
        if (get(head, 2) != a->magic || head[2] != a->version || head[3] != DISPATCH || head[5] != a->dtype || head[7] ||
            get(head + 20, 2) || rows < 1 || rows > a->max_rows || pairs < 1 || pairs > a->max_pairs || groups < 1 ||
            groups > a->max_groups || (int64_t)get(head + 22, 2) >= a->L || body > MOST_BODY ||
            body != front - HEADER_BYTES + rows * a->D * a->item_bytes ||
            (int64_t)get(head + 24, 8) + link->offset_us <= received_ns / 1000 || get(head + 54, 2) > (uint64_t)rows)
            return;
        int here = 0;
        if (ioctl(link->fd, FIONREAD, &here) < 0)
            return;
        is_here = here >= HEADER_BYTES + body && seen >= front;
        if (!is_here)
            sched_yield();
    }
    if (!is_here)
        return;
    const uint16_t *experts = (const uint16_t *)(link->front + HEADER_BYTES), *counts = experts + groups;
    const uint32_t *pair_rows = (const uint32_t *)(counts + groups);
    int64_t layer = (int64_t)get(link->front + 22, 2), total = 0;
    const void *const *weights = a->weights + layer * a->E;
    for (int64_t g = 0; g < groups; g++)
        if (experts[g] < a->E)
            a->at[experts[g]] = 0;
    for (int64_t g = 0; g < groups; g++) {
        total += counts[g];
        if (experts[g] >= a->E || !counts[g] || a->at[experts[g]]++)
            return;
        link->weights[g] = __atomic_load_n(weights + experts[g], __ATOMIC_ACQUIRE);
        if (!link->weights[g])
            return;
    }
    if (total != pairs)
        return;
    for (int64_t p = 0; p < pairs; p++)
        if (pair_rows[p] >= rows)
            return;
    int64_t sent_us = (int64_t)get(link->front + 56, 8), received_us = received_ns / 1000;
    struct iovec parts[2] = {{link->front, (size_t)front}, {link->x, (size_t)(rows * a->D * a->item_bytes)}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    link->state = BROKE;
    if (recvmsg(link->fd, &message, MSG_WAITALL) != HEADER_BYTES + body)
        return;
    if (!link->least_received_us || received_us - sent_us < link->least_received_us - link->least_sent_us) {
        link->least_sent_us = sent_us;
        link->least_received_us = received_us;
    }
    link->rows = rows;
    link->pairs = pairs;
    link->groups = groups;
    link->layer = layer;
    link->received_ns = received_ns;
    link->dispatches++;
    link->total_rows += rows;
    link->total_pairs += pairs;
    link->bytes_out += HEADER_BYTES + body;
    link->state = HOLDS;
    if (!a->max_log)
        return;
    int64_t *entry = a->log + 4 * a->num_log++;
    entry[0] = link - a->links;
    entry[1] = layer;
    entry[2] = rows - (int64_t)get(link->front + 54, 2);
    entry[3] = received_ns;
    if (link->last_layer >= 0 && layer == (link->last_layer + 1) % a->L) {
        int64_t gap = received_ns - link->last_ns, usual = link->layer_ns ? link->layer_ns : gap;
        int64_t found = (4 * usual + gap) / 5;
        link->layer_ns = found < 2 * usual ? found : 2 * usual; /* one long pause is no habit */
    }
    link->last_layer = layer;
    link->last_ns = received_ns;
}

/* Until when a layer's rows wait for those of other routers; the past: no longer. */
static int64_t wait_until(const struct answer *a, int64_t layer, int64_t arrived_ns)
{
    int64_t layer_ns = 0, until = 0;
    for (const struct lent_link *one = a->links; one < a->links + a->num_links; one++)
        if (one->state == HOLDS && one->layer == layer && one->layer_ns > layer_ns)
            layer_ns = one->layer_ns;
    int64_t longest = arrived_ns + (int64_t)(WAITS * layer_ns);
    for (const struct lent_link *one = a->links; one < a->links + a->num_links; one++) {
        if ((one->state == HOLDS && one->layer == layer) || !one->layer_ns)
            continue;
        int64_t behind = ((layer - one->last_layer) % a->L + a->L) % a->L;
        if (behind < 1 || behind > a->L / 2 || arrived_ns - one->last_ns >= (int64_t)(ACTIVE * one->layer_ns))
            continue;
        int64_t expected = one->last_ns + (int64_t)(behind * LATE * one->layer_ns);
        expected = expected < longest ? expected : longest;
        until = expected > until ? expected : until;
    }
    return until;
}

static void reply_to(struct answer *a, struct lent_link *link, const uint8_t *y, int64_t began, int64_t ended)
{
    int64_t back = link->rows * a->D * a->item_bytes;
    uint64_t seq = get(link->front + 8, 8);
    memset(link->head, 0, sizeof link->head);
    put(link->head, a->magic, 2);
    link->head[2] = a->version;
    link->head[3] = REPLY;
    link->head[5] = a->dtype;
    put(link->head + 8, seq, 8);
    put(link->head + 16, (uint64_t)back, 4);
    put(link->head + 24, (uint64_t)((ended - began) / 1000), 4);
    put(link->head + 28, (uint64_t)((began - link->received_ns) / 1000), 4);
    put(link->head + 36, (uint64_t)link->rows, 4);
    put(link->head + 56, (uint64_t)(now_ns() / 1000), 8);
    struct iovec parts[2] = {{link->head, HEADER_BYTES}, {(void *)y, (size_t)back}};
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    ssize_t sent;
    do
        sent = sendmsg(link->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    link->bytes_back += HEADER_BYTES + back;
    a->wait_ns += began - link->received_ns;
    link->state = IS_IDLE;
    if (sent == HEADER_BYTES + back)
        return;
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) {
        link->state = BROKE;
        return;
    }
    link->state = OWES;
    link->sent_bytes = sent < 0 ? 0 : sent;
    memcpy(link->x, y, back); /* the sums' memory is for the next batch */
}

#define VISIT_HEAD 4

/* Note which experts a batch visits, in their order; a->at still holds their counts. */
static void note_visit(struct answer *a, int64_t layer, int64_t began)
{
    int64_t num_decode = 0, groups = 0, *visit = a->visits + a->num_visits;
    memset(a->of_decode, 0, a->E * sizeof *a->of_decode);
    for (const struct lent_link *one = a->links; one < a->links + a->num_links; one++) {
        if (one->state != HOLDS || one->layer != layer)
            continue;
        const uint16_t *experts = (const uint16_t *)(one->front + HEADER_BYTES), *counts = experts + one->groups;
        const uint32_t *pair_rows = (const uint32_t *)(counts + one->groups);
        int64_t decoding = one->rows - (int64_t)get(one->front + 54, 2);
        num_decode += decoding;
        for (int64_t g = 0; g < one->groups; g++)
            for (const uint32_t *end = pair_rows + counts[g]; pair_rows < end; pair_rows++)
                a->of_decode[experts[g]] += *pair_rows < decoding;
    }
    for (int64_t e = 0; e < a->E; e++)
        if (a->at[e]) {
            visit[VISIT_HEAD + 2 * groups] = e;
            visit[VISIT_HEAD + 2 * groups++ + 1] = a->of_decode[e];
        }
    visit[0] = layer;
    visit[1] = began;
    visit[2] = num_decode;
    visit[3] = groups;
    a->num_visits += VISIT_HEAD + 2 * groups;
}

/* Compute and answer what links hold of a layer, together: each expert is read once for all of them. */
static void serve_layer(struct answer *a, int64_t layer)
{
    int64_t rows = 0, pairs = 0, groups = 0, row_bytes = a->D * a->item_bytes, num = 0;
    const uint8_t *x = a->x;
    memset(a->at, 0, a->E * sizeof *a->at);
    for (struct lent_link *one = a->links; one < a->links + a->num_links; one++) {
        if (one->state != HOLDS || one->layer != layer)
            continue;
        const uint16_t *experts = (const uint16_t *)(one->front + HEADER_BYTES), *counts = experts + one->groups;
        for (int64_t g = 0; g < one->groups; g++) {
            a->at[experts[g]] += counts[g];
            a->found[experts[g]] = one->weights[g];
        }
        num++;
        rows += one->rows;
        x = one->x;
    }
    if (num > 1) {
        int64_t at = 0;
        for (struct lent_link *one = a->links; one < a->links + a->num_links; one++)
            if (one->state == HOLDS && one->layer == layer) {
                memcpy(a->x + at * row_bytes, one->x, one->rows * row_bytes);
                at += one->rows;
            }
        x = a->x;
    }
    if (a->visits)
        note_visit(a, layer, now_ns());
    for (int64_t e = 0; e < a->E; e++) { /* counts become where each expert's pairs begin */
        int64_t count = a->at[e];
        a->at[e] = pairs;
        if (!count)
            continue;
        a->counts[groups] = count;
        a->chosen[groups++] = a->found[e];
        pairs += count;
    }
    int64_t first_row = 0;
    for (struct lent_link *one = a->links; one < a->links + a->num_links; one++) {
        if (one->state != HOLDS || one->layer != layer)
            continue;
        const uint16_t *experts = (const uint16_t *)(one->front + HEADER_BYTES), *counts = experts + one->groups;
        const uint32_t *pair_rows = (const uint32_t *)(counts + one->groups);
        const float *pair_weights = (const float *)(pair_rows + one->pairs);
        for (int64_t g = 0, p = 0; g < one->groups; g++)
            for (int64_t c = 0; c < counts[g]; c++, p++) {
                int64_t at = a->at[experts[g]]++;
                a->pair_rows[at] = pair_rows[p] + first_row;
                a->pair_weights[at] = pair_weights[p];
            }
        first_row += one->rows;
    }
    int64_t began = now_ns();
    int failed = collegium_serve(a->shape, x, rows, a->pair_rows, a->pair_weights, pairs, a->counts, a->chosen, groups,
                                 a->out, a->num_threads);
    int64_t ended = now_ns(), at = 0;
    a->batches++;
    a->groups += groups;
    a->compute_ns += ended - began;
    if (num > 1) {
        a->joined_batches++;
        a->joined_dispatches += num;
    }
    for (struct lent_link *one = a->links; one < a->links + a->num_links; one++)
        if (one->state == HOLDS && one->layer == layer) {
            const uint8_t *y = a->out + at * row_bytes;
            at += one->rows;
            if (failed)
                one->state = BROKE;
            else
                reply_to(a, one, y, began, ended);
        }
}

/* Answer the dispatches of some links until `until_ns`, or until there is anything else to do: IDLE or OTHER. Afterwards no
 * link holds a dispatch, and the state of each says whether there is something to see to. */
int collegium_answer(struct answer *a)
{
    int is_other = 0;
    for (;;) {
        int64_t now = now_ns(), soonest = a->until_ns, layer = -1, num_held = 0;
        int is_full = a->max_log && a->num_log + a->num_links > a->max_log;
        is_full |= a->visits && a->num_visits + a->num_links * (VISIT_HEAD + 2 * a->E) > a->max_visits;
        int is_leaving = is_other || is_full || now >= a->until_ns;
        for (int64_t done_ns = -1;;) { /* layers that are waited for, oldest dispatch first */
            const struct lent_link *oldest = NULL;
            for (const struct lent_link *one = a->links; one < a->links + a->num_links; one++)
                if (one->state == HOLDS && one->received_ns > done_ns && (!oldest || one->received_ns < oldest->received_ns))
                    oldest = one;
            if (!oldest)
                break;
            num_held++;
            done_ns = oldest->received_ns;
            int64_t until = is_leaving || !a->is_waiting ? 0 : wait_until(a, oldest->layer, oldest->received_ns);
            if (until <= now) {
                layer = oldest->layer;
                break;
            }
            soonest = until < soonest ? until : soonest;
        }
        if (is_leaving && layer < 0)
            return is_other ? OTHER : IDLE;
        struct epoll_event events[16];
        int num = 0;
        if (!is_leaving && (layer < 0 || num_held < a->num_links)) {
            int64_t left_ns = layer < 0 ? soonest - now : 0;
            num = epoll_wait(a->epoll_fd, events, 16, (int)((left_ns + 999999) / 1000000));
            int64_t after = now_ns();
            if (num_held && layer < 0)
                a->join_wait_ns += after - now;
            if (num < 0 && errno != EINTR)
                is_other = 1;
            for (int i = 0; i < num; i++) {
                struct lent_link *found = NULL;
                for (struct lent_link *one = a->links; one < a->links + a->num_links; one++)
                    if (one->fd == events[i].data.fd)
                        found = one;
                if (!found || events[i].events != EPOLLIN || (found->state != IS_IDLE && found->state != HOLDS))
                    is_other = 1;
                else if (found->state == IS_IDLE) {
                    take_dispatch(a, found, after + i); /* no two arrive at the same time */
                    is_other |= found->state != HOLDS && found->state != IS_IDLE;
                } else if (layer < 0)
                    layer = found->layer; /* it has sent another one: nothing is gained by waiting */
            }
        }
        if (layer < 0)
            continue;
        serve_layer(a, layer);
        for (const struct lent_link *one = a->links; one < a->links + a->num_links; one++)
            is_other |= one->state != IS_IDLE && one->state != HOLDS;
    }
}
