/* One layer's way to the workers and back, for the steps that nothing disturbs: plan, send, count, receive, sum.
 *
 * Owns no connection: the caller lends descriptors of links that are idle and open, and takes them back. Whatever is out
 * of the ordinary (a frame that is no good reply, one that is late, a peer that has gone) is left unread, so that the
 * caller goes on where this stopped. Frames are those of collegium/link/header.py. Linux. */

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <time.h>
#include <poll.h>
#include <sched.h>

#define HEADER_BYTES 64
#define DISPATCH 3
#define REPLY 4
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

/* Take a good reply of `rows` rows off the socket; 0, or -1 with nothing taken, or -2 where the connection is of no use. */
static int take_reply(const struct exchange *e, int fd, uint64_t seq, int64_t rows, uint8_t *y)
{
    uint8_t head[HEADER_BYTES];
    int64_t body = rows * e->D * e->item_bytes;
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
        if (get(head, 2) != e->magic || head[2] != e->version || head[3] != REPLY || head[4] || head[5] != e->dtype ||
            get(head + 8, 8) != seq || get(head + 16, 4) != (uint64_t)body || get(head + 32, 4) ||
            get(head + 36, 4) != (uint64_t)rows)
            return -1;
        int here = 0;
        if (ioctl(fd, FIONREAD, &here) < 0)
            return -1;
        if (here < HEADER_BYTES + body) {
            sched_yield();
            continue;
        }
        struct iovec parts[2] = {{head, HEADER_BYTES}, {y, (size_t)body}};
        struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
        ssize_t taken = recvmsg(fd, &message, MSG_WAITALL);
        return taken == HEADER_BYTES + body ? 0 : -2;
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

/* Have a layer's experts computed. 0: out is written. 1: something was out of the ordinary, and states says how far each
 * worker's dispatch has come. -1: an id or a worker is out of range, and nothing was done. */
int collegium_exchange(struct exchange *e)
{
    int64_t num_pairs = collegium_plan(e->ids, e->weights, e->worker_of, e->workers, e->T, e->K, e->E, e->W, e->sizes,
                                       e->tokens, e->experts, e->counts, e->pair_rows, e->pair_weights, e->scratch);
    if (num_pairs < 0)
        return -1;
    int64_t row_bytes = e->D * e->item_bytes, row = 0, group = 0, pair = 0, began = now_ns();
    int is_whole = 1;
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
    int64_t waits = now_ns();
    row = 0;
    for (int64_t w = 0; w < e->W; w++) {
        int64_t rows = e->sizes[3 * w];
        if (e->states[w] == SENT) {
            int failed = take_reply(e, e->fds[w], (e->seq + (uint64_t)w) & 0xffffffff, rows, e->replies + row * row_bytes);
            e->states[w] = !failed ? DONE : failed == -1 ? SENT : BROKEN;
            if (failed)
                is_whole = 0;
            else {
                e->totals[6 * w + 4] += rows;
                e->totals[6 * w + 5] += HEADER_BYTES + rows * row_bytes;
            }
        }
        row += rows;
    }
    int64_t over = now_ns();
    e->blocked_ns = over - waits;
    e->away_ns = over - began;
    if (!is_whole)
        return 1;
    sum_replies(e);
    return 0;
}
