/* A router's end of its links where nothing disturbs it: a layer's way to the workers and back, plan, send, count, receive,
 * sum; and a step of layers.
 *
 * Owns no connection: the caller lends descriptors of links that are idle and open, and takes them back. Whatever is out
 * of the ordinary (a frame that is no good reply, one that is late, a peer that has gone) is left unread, so that the caller
 * goes on where this stopped. Linux. */

#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <sched.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include "frame.h"
#include "layer.h"

#define SPINS 200 /* looks for the rest of a header without a pause */

int64_t collegium_plan(const int64_t *ids, const float *weights, const int64_t *worker_of, const int64_t *workers,
                       int64_t T, int64_t K, int64_t E, int64_t W, int64_t *sizes, int64_t *tokens, uint16_t *experts,
                       uint16_t *counts, uint32_t *pair_rows, float *pair_weights, int64_t *scratch);

enum { OUT_OF_RANGE = -1, NO_MEMORY = -2 }; /* a choice of no expert or worker; or what a step needs beside its exchange */

enum state { UNSENT, SENT, DONE, BROKEN, SUSPECT }; /* SUSPECT: rows came that are no numbers, of rows that are */

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
    int64_t patience_us;              /* what a worker that says it is slow has from then on */
    uint32_t step;
    uint16_t layer;
    uint8_t dtype;
    uint8_t text_bytes;  /* of a traceparent that goes with every dispatch */
    const uint8_t *text;
    /* the plan, as collegium_plan writes it */
    int64_t *sizes, *tokens, *scratch;
    uint16_t *experts, *counts;
    uint32_t *pair_rows;
    float *pair_weights;
    /* memory: rows as they are sent and as they come back, those of one worker after another's; sums [T, D] in 8 bytes */
    uint8_t *gathered, *replies;
    void *sums;
    int32_t *states; /* [W] enum state */
    uint8_t *const *no_hints; /* [W] of each link, the caller's: whether its worker has a use for hints now */
    int64_t *totals; /* [W, 6] dispatches, rows, pairs, bytes out, rows back, bytes back: counted up */
    int64_t blocked_ns, away_ns; /* of this call */
    int64_t began_ns;            /* when its first dispatch was sent */
};

/* Leave out of some parts the bytes that have been moved. */
static void advance(struct msghdr *message, int64_t moved)
{
    while (moved > 0 && message->msg_iovlen) {
        struct iovec *first = message->msg_iov;
        size_t part = (size_t)moved < first->iov_len ? (size_t)moved : first->iov_len;
        first->iov_base = (uint8_t *)first->iov_base + part;
        first->iov_len -= part;
        moved -= (int64_t)part;
        if (!first->iov_len) {
            message->msg_iov++;
            message->msg_iovlen--;
        }
    }
}

/* Wait until a socket can be read or written, for a moment; 0 once the time is over. */
static int wait_for(int fd, short event, int64_t until_us)
{
    int64_t left = until_us - now_ns() / 1000;
    if (left <= 0)
        return 0;
    struct pollfd wait = {.fd = fd, .events = event};
    poll(&wait, 1, left < 100000 ? (int)(left / 1000) + 1 : 100);
    return 1;
}

/* Send all of it, waiting until then for a peer that does not read. 0, or -1 where nothing has left, or -2. */
static int send_all(int fd, struct iovec *parts, int num_parts, int64_t left, int64_t until_us)
{
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = (size_t)num_parts};
    int64_t sent = 0;
    while (left > 0) {
        ssize_t taken = sendmsg(fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (taken < 0 && errno == EINTR)
            continue;
        if (taken < 0 && ((errno != EAGAIN && errno != EWOULDBLOCK) || !wait_for(fd, POLLOUT, until_us)))
            return sent ? -2 : -1;
        if (taken < 0)
            continue;
        sent += taken;
        left -= taken;
        advance(&message, taken);
    }
    return 0;
}

#define MOST_MISSES 4096

/* Whether all of n numbers are finite. */
static int are_finite(const void *at, int64_t n, int64_t item_bytes)
{
    uint32_t wrong = 0; /* of a number whose exponent has all bits set */
    if (item_bytes == 4)
        for (int64_t i = 0; i < n; i++)
            wrong |= (((const uint32_t *)at)[i] & 0x7f800000) == 0x7f800000;
    else
        for (int64_t i = 0; i < n; i++)
            wrong |= (((const uint16_t *)at)[i] & 0x7f80) == 0x7f80;
    return !wrong;
}

/* Take a good reply to `rows` rows of `groups` experts off the socket; the bytes of its list of misses, or -1 with nothing
 * taken, or -2 where the connection is of no use. What was missed is passed over: who asks for that goes the long way. A
 * worker that says it is slow has as long again. */
static int64_t take_reply(struct exchange *e, int64_t w, uint64_t seq, int64_t rows, int64_t groups, uint8_t *y)
{
    int fd = e->fds[w];
    uint8_t head[HEADER_BYTES];
    uint16_t missed[MOST_MISSES];
    for (int spins = 0;;) {
        ssize_t seen = recv(fd, head, sizeof head, MSG_PEEK); /* waits as long as the socket's own limit says, or less */
        if (seen < 0 && errno == EINTR)
            continue;
        if (seen < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) && wait_for(fd, POLLIN, (int64_t)e->deadline_us))
            continue;
        if (seen <= 0)
            return -1;
        if (seen < HEADER_BYTES) { /* the rest of it is here at once, or the caller's to wait for */
            struct pollfd end = {.fd = fd, .events = POLLRDHUP};
            if (now_ns() / 1000 >= (int64_t)e->deadline_us || poll(&end, 1, spins++ < SPINS ? 0 : 1) > 0)
                return -1;
            sched_yield();
            continue;
        }
        if (get(head + AT_MAGIC, 2) != MAGIC || head[AT_VERSION] != VERSION)
            return -1;
        if (head[AT_KIND] == PROGRESS && !get(head + AT_BODY, 4)) {
            if (recv(fd, head, sizeof head, MSG_DONTWAIT) != HEADER_BYTES)
                return -2;
            uint64_t until = (uint64_t)(now_ns() / 1000 + e->patience_us);
            e->deadline_us = until > e->deadline_us ? until : e->deadline_us;
            e->totals[6 * w + 5] += HEADER_BYTES;
            continue;
        }
        int64_t num_missed = (int64_t)get(head + AT_MISSES, 4), row_bytes = rows * e->D * e->item_bytes;
        int64_t body = row_bytes + 2 * num_missed, left = HEADER_BYTES + body;
        if (head[AT_KIND] != REPLY || head[AT_STATUS] != STATUS_OK || head[AT_DTYPE] != e->dtype ||
            get(head + AT_SEQ, 8) != seq || num_missed > groups || num_missed > MOST_MISSES ||
            get(head + AT_BODY, 4) != (uint64_t)body || get(head + AT_REPLY_ROWS, 4) != (uint64_t)rows)
            return -1;
        struct iovec parts[3] = {{head, HEADER_BYTES}, {y, (size_t)row_bytes}, {missed, 2 * (size_t)num_missed}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 3};
        while (left > 0) {
            ssize_t taken = recvmsg(fd, &message, MSG_DONTWAIT);
            if (taken < 0 && errno == EINTR)
                continue;
            if (taken < 0 && (errno == EAGAIN || errno == EWOULDBLOCK) && wait_for(fd, POLLIN, (int64_t)e->deadline_us))
                continue;
            if (taken <= 0)
                return -2;
            left -= taken;
            advance(&message, taken);
        }
        *e->no_hints[w] = (head[AT_FLAGS] & NO_HINTS) != 0;
        return 2 * num_missed;
    }
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
        int64_t body = 4 * groups + 8 * pairs + rows * row_bytes + e->text_bytes;
        uint8_t head[HEADER_BYTES] = {0};
        put(head + AT_MAGIC, MAGIC, 2);
        head[AT_VERSION] = VERSION;
        head[AT_KIND] = DISPATCH;
        head[AT_DTYPE] = e->dtype;
        put(head + AT_SEQ, (e->seq + (uint64_t)w) & 0xffffffff, 8);
        put(head + AT_BODY, (uint64_t)body, 4);
        put(head + AT_TEXT, e->text_bytes, 2);
        put(head + AT_LAYER, e->layer, 2);
        put(head + AT_DEADLINE_US, e->deadline_us, 8);
        put(head + AT_EPOCH, e->epoch, 8);
        put(head + AT_STEP, e->step, 4);
        put(head + AT_ROWS, (uint64_t)rows, 4);
        put(head + AT_PAIRS, (uint64_t)pairs, 4);
        put(head + AT_GROUPS, (uint64_t)groups, 2);
        put(head + AT_PROMPTS, (uint64_t)prompts, 2);
        put(head + AT_SENT_US, (uint64_t)(now_ns() / 1000), 8);
        struct iovec parts[7] = {
            {head, HEADER_BYTES},
            {e->experts + group, 2 * (size_t)groups},
            {e->counts + group, 2 * (size_t)groups},
            {e->pair_rows + pair, 4 * (size_t)pairs},
            {e->pair_weights + pair, 4 * (size_t)pairs},
            {(void *)x, (size_t)(rows * row_bytes)},
            {(void *)e->text, e->text_bytes},
        };
        int failed = send_all(e->fds[w], parts, 7, HEADER_BYTES + body, (int64_t)e->deadline_us);
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

/* Whether a worker's rows may be summed: finite, or made of rows or weights that are not. One that are not must not get into a
 * sequence's cache, where whatever begins alike would meet it again. */
static int are_plausible(const struct exchange *e, int64_t w, int64_t row, int64_t pair)
{
    int64_t rows = e->sizes[3 * w], pairs = e->sizes[3 * w + 2], row_bytes = e->D * e->item_bytes;
    if (are_finite(e->replies + row * row_bytes, rows * e->D, e->item_bytes))
        return 1;
    int is_sound = are_finite(e->pair_weights + pair, pairs, 4);
    for (int64_t r = 0; r < rows && is_sound; r++)
        is_sound = are_finite(e->x + e->tokens[row + r] * row_bytes, e->D, e->item_bytes);
    return !is_sound;
}

/* Receive what is on its way, from workers whose descriptors are there, and sum. 0: out is written. 1: as above. */
int collegium_receive(struct exchange *e)
{
    int64_t row_bytes = e->D * e->item_bytes, row = 0, pair = 0, waits = now_ns();
    int is_whole = 1;
    for (int64_t w = 0; w < e->W; w++) {
        int64_t rows = e->sizes[3 * w];
        if (e->states[w] == SENT && e->fds[w] >= 0) {
            int64_t missed_bytes = take_reply(e, w, (e->seq + (uint64_t)w) & 0xffffffff, rows,
                                              e->sizes[3 * w + 1], e->replies + row * row_bytes);
            e->states[w] = missed_bytes >= 0 ? DONE : missed_bytes == -1 ? SENT : BROKEN;
            if (missed_bytes < 0)
                is_whole = 0;
            else {
                e->states[w] = are_plausible(e, w, row, pair) ? DONE : SUSPECT;
                e->totals[6 * w + 4] += rows;
                e->totals[6 * w + 5] += HEADER_BYTES + rows * row_bytes + missed_bytes;
            }
        }
        is_whole &= !rows || e->states[w] == DONE;
        row += rows;
        pair += e->sizes[3 * w + 2];
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

int64_t collegium_choose_replicas(const int64_t *ids, const int64_t *counts, const int64_t *worker_of, const int64_t *copied,
                                  const int64_t *starts, const int64_t *homes, int64_t M, int64_t T, int64_t K, int64_t E,
                                  int64_t W, double activation, int64_t *workers, double *work, uint8_t *visits,
                                  int64_t *order, uint8_t *given);

struct copies { /* a layer's experts with several homes, [num]: those of the nth are homes[starts[n]] to homes[starts[n + 1]] */
    const int64_t *experts, *starts, *homes;
    int64_t num;
};

/* What a step foretells of the layers ahead, for workers that have a use for hints. */
struct foretell {
    int64_t num_ahead, num_known;  /* layers that are foretold at each; first layers of which some rows are known */
    const uint8_t *wants;          /* [W] */
    const uint8_t *known;          /* [num_known, T] rows whose choices were told before the step: they are in foretold */
    int32_t *foretold;             /* [L, T, K]; a row's first is -1 where nothing was foretold */
    int64_t *chosen;               /* [num_known, T, K] out: what these layers chose */
    int64_t *expected;             /* [E], zeros between uses */
    uint8_t *frame;                /* [HEADER_BYTES + 4 * E] */
    int64_t *told;                 /* [W, 2] hints and their bytes, counted up */
    int64_t hinted, right;         /* choices that were foretold, and of them those that were made: counted up */
};

struct step {
    struct exchange *exchange;           /* its rows, ids, weights and sums are this step's; what is set by layer is not */
    const struct layer *const *blocks;   /* [num_blocks] all layers of the model */
    const struct layer *const *layers;   /* [L] those that have routed experts: what is counted, named and told by layer is of these */
    const int64_t *const *worker_of;     /* [L] -> [E] */
    int64_t num_blocks, L, timeout_us;
    int64_t *decode, *prefill, *activations; /* [L, E], counted up */
    const void *embedding;               /* [V, D] */
    const float *cos_table, *sin_table;  /* [positions, W] */
    const int64_t *tokens, *positions;   /* [T] */
    const struct norm *final_norm;
    float *h;                            /* [T, D] */
    float *cos, *sin;                    /* [T, W] */
    const int64_t *slots, *kv_blocks, *first_block, *lengths;
    const int64_t *source_blocks, *source_first, *source_lengths; /* of attention to sources, where layers have that */
    const float *position_table;                                  /* [positions, D] added to embeddings; NULL: nothing is */
    float *q, *attended, *scratch;
    int64_t block, layer; /* in: the first; out: the one that was disturbed, or num_blocks and L */
    int64_t blocked_ns, away_ns; /* of this call */
    int64_t num_threads, W;
    double embedding_scale;
    /* where copies is not NULL: memory to choose among them in */
    const struct copies *copies; /* [L] */
    double activation_rows;
    int64_t *workers, *counts, *order; /* [T, K], [E], [most copies + W] */
    double *work;                      /* [W] */
    uint8_t *visits, *given;           /* [T, W], [E] */
    struct foretell *foretell;         /* NULL: nobody has a use for hints */
    /* where texts is not NULL, the step is traced: each layer's traceparent, its first byte 0 where the layer is not, and when
     * its rows were sent and were back, of the monotonic clock */
    const uint8_t *texts; /* [L, text_bytes] */
    int64_t text_bytes;
    int64_t *stamps; /* [L, 2] out */
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

/* Count how much of what was foretold of a layer has come true. */
static void settle(struct foretell *f, const struct exchange *e, int64_t layer)
{
    const int32_t *said = f->foretold + layer * e->T * e->K;
    for (int64_t t = 0; t < e->T; t++) {
        if (said[t * e->K] < 0)
            continue;
        f->hinted += e->K;
        for (int64_t k = 0; k < e->K; k++)
            for (int64_t j = 0; j < e->K; j++)
                f->right += said[t * e->K + k] == e->ids[t * e->K + j];
    }
    if (layer < f->num_known)
        memcpy(f->chosen + layer * e->T * e->K, e->ids, (size_t)(e->T * e->K) * sizeof *e->ids);
}

/* Tell a worker which experts of a layer it may be asked for, where the socket takes that now. */
static void hint(struct foretell *f, const struct exchange *e, int64_t w, int64_t layer, const int64_t *worker_of)
{
    int64_t groups = 0;
    uint8_t *experts = f->frame + HEADER_BYTES;
    for (int64_t expert = 0; expert < e->E; expert++)
        if (f->expected[expert] && worker_of[expert] == w)
            put(experts + 2 * groups++, (uint64_t)expert, 2);
    if (!groups)
        return;
    for (int64_t g = 0; g < groups; g++)
        put(experts + 2 * (groups + g), (uint64_t)f->expected[get(experts + 2 * g, 2)], 2);
    memset(f->frame, 0, HEADER_BYTES);
    put(f->frame + AT_MAGIC, MAGIC, 2);
    f->frame[AT_VERSION] = VERSION;
    f->frame[AT_KIND] = HINT;
    put(f->frame + AT_BODY, (uint64_t)(4 * groups), 4);
    put(f->frame + AT_LAYER, (uint64_t)layer, 2);
    put(f->frame + AT_GROUPS, (uint64_t)groups, 2);
    put(f->frame + AT_SENT_US, (uint64_t)(now_ns() / 1000), 8);
    int64_t size = HEADER_BYTES + 4 * groups;
    ssize_t taken = send(e->fds[w], f->frame, (size_t)size, MSG_DONTWAIT | MSG_NOSIGNAL);
    struct iovec rest = {f->frame + taken, (size_t)(size - taken)};
    if (taken <= 0)
        return;
    if (taken < size && send_all(e->fds[w], &rest, 1, size - taken, (int64_t)e->deadline_us)) {
        shutdown(e->fds[w], SHUT_RDWR); /* half a frame: the reply that does not come tells the caller */
        return;
    }
    f->told[2 * w]++;
    f->told[2 * w + 1] += HEADER_BYTES + 4 * groups;
}

/* While a layer's rows are away, ask the gates of the next ones about them, and tell the workers. */
static void foretell(const struct step *s)
{
    struct foretell *f = s->foretell;
    const struct exchange *e = s->exchange;
    for (int64_t layer = s->layer + 1; layer < s->L && layer <= s->layer + f->num_ahead; layer++) {
        const uint8_t *known = layer < f->num_known ? f->known + layer * e->T : NULL;
        int32_t *said = f->foretold + layer * e->T * e->K;
        int64_t num = 0;
        for (int64_t t = 0; t < e->T; t++)
            num += !known || !known[t];
        if (!num)
            continue;
        if (num == e->T)
            collegium_foretell(s->layers[layer], e->x, e->T, said, s->scratch, (int)s->num_threads);
        else
            for (int64_t t = 0; t < e->T; t++) /* those whose choices are not known, one by one: they are few */
                if (!known[t])
                    collegium_foretell(s->layers[layer], e->x + t * e->D * e->item_bytes, 1, said + t * e->K, s->scratch,
                                       (int)s->num_threads);
        for (int64_t t = 0; t < e->T; t++)
            for (int64_t k = 0; k < e->K && !(known && known[t]); k++)
                f->expected[said[t * e->K + k]]++;
        for (int64_t w = 0; w < e->W; w++)
            if (f->wants[w] && !*e->no_hints[w])
                hint(f, e, w, layer, s->worker_of[layer]);
        memset(f->expected, 0, (size_t)e->E * sizeof *f->expected);
    }
}

/* Have the experts of the layer at hand computed. Returns as collegium_exchange. */
static int exchange_layer(struct step *s, const struct layer *block, uint64_t seq)
{
    struct exchange *e = s->exchange;
    int64_t offset = s->layer * e->E;
    e->decode = s->decode + offset;
    e->prefill = s->prefill + offset;
    e->activations = s->activations + offset;
    e->worker_of = s->worker_of[s->layer];
    e->workers = NULL;
    if (s->copies && s->copies[s->layer].num && choose(s, s->copies + s->layer, s->decode + offset, s->activations + offset) < 0)
        return OUT_OF_RANGE;
    e->seq = seq & 0xffffffff;
    e->deadline_us = (uint64_t)(now_ns() / 1000 + s->timeout_us);
    e->layer = (uint16_t)s->layer;
    if (s->foretell)
        settle(s->foretell, e, s->layer);
    if (s->texts) {
        e->text = s->texts + s->layer * s->text_bytes;
        e->text_bytes = *e->text ? (uint8_t)s->text_bytes : 0;
    }
    int found = collegium_send(e), failed = 0;
    if (found >= 0 && block->mlp.shape) /* the experts that all rows share, while their rows are away */
        failed = collegium_mlp(block, e->x, e->T, s->h, (int)s->num_threads);
    if (!found && s->foretell)
        foretell(s);
    if (found >= 0)
        found = collegium_receive(e);
    if (s->texts) {
        s->stamps[2 * s->layer] = e->began_ns;
        s->stamps[2 * s->layer + 1] = now_ns();
    }
    s->blocked_ns += e->blocked_ns;
    s->away_ns += e->away_ns;
    return failed ? NO_MEMORY : found;
}

/* Compute a step of decode rows from its tokens to the rows for the head, e->x, experts included. 0: all is done. Else what
 * collegium_exchange said of `layer`, whose exchange tells the rest: nothing of its sums has been added to h, but what its rows
 * share has. Or NO_MEMORY, and the step is lost. */
int collegium_step(struct step *s)
{
    struct exchange *e = s->exchange;
    int num_threads = (int)s->num_threads;
    int is_bf16 = e->item_bytes == 2;
    s->blocked_ns = s->away_ns = 0;
    if (!s->block) {
        collegium_embed(s->h, s->embedding, s->tokens, e->T, e->D, (float)s->embedding_scale, is_bf16);
        for (int64_t t = 0; t < e->T; t++) {
            memcpy(s->cos + t * s->W, s->cos_table + s->positions[t] * s->W, s->W * sizeof *s->cos);
            memcpy(s->sin + t * s->W, s->sin_table + s->positions[t] * s->W, s->W * sizeof *s->sin);
            if (s->position_table)
                collegium_add(s->h + t * e->D, s->position_table + s->positions[t] * e->D, e->D, 1, 0);
        }
    }
    for (uint64_t seq = e->seq; s->block < s->num_blocks; s->block++) {
        const struct layer *block = s->blocks[s->block];
        collegium_qkv(block, s->h, s->cos, s->sin, s->slots, e->T, s->q, s->scratch, num_threads);
        if (collegium_attend(block, s->q, s->kv_blocks, s->first_block, s->lengths, e->T, s->attended, num_threads))
            return NO_MEMORY;
        if (block->cross.query) {
            collegium_query_source(block, s->attended, s->h, e->T, s->q, s->scratch, num_threads);
            collegium_attend_source(block, s->q, s->source_blocks, s->source_first, s->source_lengths, e->T, s->attended,
                                    num_threads);
        }
        collegium_output(block, s->attended, s->h, e->T, (void *)e->x, (int64_t *)e->ids, (float *)e->weights, s->scratch,
                         num_threads);
        if (!block->E) {
            if (collegium_mlp(block, e->x, e->T, s->h, num_threads))
                return NO_MEMORY;
            continue;
        }
        int found = exchange_layer(s, block, seq);
        if (found)
            return found;
        collegium_add(s->h, e->out, e->T * e->D, block->residual, is_bf16);
        s->layer++;
        seq += (uint64_t)e->W;
    }
    collegium_norm_rows((void *)e->x, s->h, s->final_norm, e->T, e->D, is_bf16, s->scratch);
    return 0;
}
