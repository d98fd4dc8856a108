/* Feed a router's end what workers may answer, and worse, and hold that what it sums, and what it leaves, is right.
 *
 * A case is one layer's exchange with two workers, one of which answers as it should, while the other's answer is drawn: a
 * reply with some bytes changed, cut, amid word of slowness, twice, or anything at all; then it may go. Built with libFuzzer
 * where clang has it (-DLIBFUZZER), else with a generator of its own: fuzz_router_end [seconds] [seed]. */

#include "../../collegium/native/router_end.c"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define MUST(what) \
    do { \
        if (!(what)) { \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #what); \
            abort(); \
        } \
    } while (0)

enum { WORKERS = 2, EXPERTS = 6, MOST_TOKENS = 5, TOP = 2, WIDTH = 8, FLOAT32_CODE = 1, MOST_SENT = 8192 };

struct program {
    const uint8_t *at, *end;
};

static unsigned next(struct program *p)
{
    return p->at < p->end ? *p->at++ : 0;
}

/* What worker `which` answers: row r of its share is all r + 1, times 10 for the second. */
static int64_t write_reply(uint8_t *to, int which, uint64_t seq, int64_t rows, int64_t missed)
{
    int64_t body = rows * WIDTH * 4 + 2 * missed;
    memset(to, 0, HEADER_BYTES);
    put(to + AT_MAGIC, MAGIC, 2);
    to[AT_VERSION] = VERSION;
    to[AT_KIND] = REPLY;
    to[AT_DTYPE] = FLOAT32_CODE;
    put(to + AT_SEQ, seq, 8);
    put(to + AT_BODY, (uint64_t)body, 4);
    put(to + AT_MISSES, (uint64_t)missed, 4);
    put(to + AT_REPLY_ROWS, (uint64_t)rows, 4);
    for (int64_t i = 0; i < rows * WIDTH; i++) {
        float value = (float)(i / WIDTH + 1) * (which ? 10.0f : 1.0f);
        memcpy(to + HEADER_BYTES + 4 * i, &value, sizeof value);
    }
    memset(to + HEADER_BYTES + rows * WIDTH * 4, 0, (size_t)(2 * missed));
    return HEADER_BYTES + body;
}

static int64_t write_progress(uint8_t *to)
{
    memset(to, 0, HEADER_BYTES);
    put(to + AT_MAGIC, MAGIC, 2);
    to[AT_VERSION] = VERSION;
    to[AT_KIND] = PROGRESS;
    return HEADER_BYTES;
}

static int64_t unread(int fd)
{
    int num = 0;
    MUST(!ioctl(fd, FIONREAD, &num));
    return num;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct program p = {data, data + size};
    int fds[WORKERS], peers[WORKERS];
    for (int w = 0; w < WORKERS; w++) {
        int pair[2];
        MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
        fds[w] = pair[0];
        peers[w] = pair[1];
    }
    /* the layer: tokens, what they chose, whose that is */
    int64_t T = 1 + next(&p) % MOST_TOKENS, ids[MOST_TOKENS * TOP], worker_of[EXPERTS], workers[MOST_TOKENS * TOP];
    float weights[MOST_TOKENS * TOP], x[MOST_TOKENS * WIDTH], out[MOST_TOKENS * WIDTH];
    int is_in_range = 1, has_copies = next(&p) % 4 == 0;
    for (int e = 0; e < EXPERTS; e++)
        worker_of[e] = e % WORKERS;
    for (int64_t i = 0; i < T * TOP; i++) {
        unsigned drawn = next(&p);
        ids[i] = drawn % 16 == 15 ? -1 : (int64_t)(drawn / 16 % (EXPERTS / 2) * 2) + i % TOP; /* each of a token's differs */
        workers[i] = ids[i] < 0 ? 0 : ids[i] % WORKERS;
        weights[i] = 0.5f;
    }
    if (next(&p) % 16 == 0) { /* a choice, or whose it is, that nobody has */
        static const int64_t wrong[] = {EXPERTS, INT64_MAX, -2, INT64_MIN};
        int64_t at = next(&p) % (T * TOP), value = wrong[next(&p) % 4];
        if (value > 0 && has_copies && next(&p) & 1 && ids[at] >= 0)
            workers[at] = value;
        else
            ids[at] = value > 0 ? value : ids[at];
        is_in_range = (ids[at] < EXPERTS) && (!has_copies || ids[at] < 0 || workers[at] < WORKERS);
    }
    for (int64_t i = 0; i < T * WIDTH; i++)
        x[i] = (float)i;
    /* exactly the memory that the binding makes */
    int64_t pairs = T * TOP, rows = T * (TOP < WORKERS ? TOP : WORKERS), totals[6 * WORKERS] = {0};
    int64_t decode[EXPERTS] = {0}, prefill[EXPERTS] = {0}, activations[EXPERTS] = {0};
    uint8_t flag[WORKERS] = {0};
    uint8_t *no_hints[WORKERS] = {flag, flag + 1};
    int32_t states[WORKERS] = {0};
    int64_t now_us = now_ns() / 1000;
    struct exchange e = {
        .fds = fds, .W = WORKERS, .E = EXPERTS, .K = TOP, .D = WIDTH, .item_bytes = 4, .T = T,
        .num_decode = next(&p) % (T + 1), .ids = ids, .worker_of = worker_of, .workers = has_copies ? workers : NULL,
        .weights = weights, .x = (const uint8_t *)x, .out = (uint8_t *)out, .decode = decode, .prefill = prefill,
        .activations = activations, .seq = 0xfffffffe + next(&p) % 4,
        .deadline_us = (uint64_t)(now_us + (next(&p) % 32 ? 0 : 1500)), .patience_us = next(&p) % 8 ? 0 : 300,
        .dtype = FLOAT32_CODE, .sizes = malloc(3 * WORKERS * 8), .tokens = malloc((size_t)pairs * 8),
        .scratch = malloc((WORKERS * EXPERTS + (size_t)T + 1) * 8), .experts = malloc((size_t)pairs * 2),
        .counts = malloc((size_t)pairs * 2), .pair_rows = malloc((size_t)pairs * 4),
        .pair_weights = malloc((size_t)pairs * 4), .gathered = malloc((size_t)(rows * WIDTH * 4)),
        .replies = malloc((size_t)(rows * WIDTH * 4)), .sums = malloc((size_t)(T * WIDTH * 8)), .states = states,
        .no_hints = no_hints, .totals = totals};
    int64_t share[WORKERS] = {0}, groups[WORKERS] = {0};
    for (int w = 0; is_in_range && w < WORKERS; w++) {
        int asked[EXPERTS] = {0};
        for (int64_t t = 0; t < T; t++) {
            int is_of = 0;
            for (int64_t k = t * TOP; k < (t + 1) * TOP; k++)
                if (ids[k] >= 0 && ids[k] % WORKERS == w)
                    is_of = asked[ids[k]] = 1;
            share[w] += is_of;
        }
        for (int i = 0; i < EXPERTS; i++)
            groups[w] += asked[i];
    }
    /* what the workers have to say lies there before they are asked */
    static uint8_t sent[MOST_SENT];
    int64_t num = write_reply(sent, 0, e.seq & 0xffffffff, share[0], 0), words = 0;
    if (share[0])
        MUST(send(peers[0], sent, (size_t)num, 0) == num);
    num = 0;
    int is_good = is_in_range;
    for (unsigned left = next(&p) % 4; left; left--, words++)
        num += write_progress(sent + num);
    int64_t missed = next(&p) % (groups[1] + 1), begin = num;
    num += write_reply(sent + num, 1, (e.seq + 1) & 0xffffffff, share[1], missed);
    unsigned how = next(&p) % 10;
    if (how == 1) { /* a field that says what this is has another value */
        static const uint8_t fields[] = {AT_MAGIC, AT_MAGIC + 1, AT_VERSION, AT_KIND, AT_STATUS, AT_DTYPE, AT_SEQ, AT_SEQ + 4,
                                         AT_BODY, AT_BODY + 3, AT_MISSES, AT_MISSES + 2, AT_REPLY_ROWS, AT_REPLY_ROWS + 1};
        sent[begin + fields[next(&p) % sizeof fields]] += (uint8_t)(1 + next(&p) % 255);
        is_good = 0;
    } else if (how == 2)
        for (unsigned changes = 1 + next(&p) % 3; changes; changes--) {
            int64_t at = (next(&p) | (int64_t)(next(&p) & 1) << 8) % num;
            uint8_t was = sent[at];
            sent[at] = (uint8_t)next(&p);
            is_good &= sent[at] == was; /* or it may be one that is as good: flags, times */
        }
    else if (how == 3)
        num = num * next(&p) / 256, is_good = 0;
    else if (how == 4)
        for (int64_t i = is_good = 0; i < num; i++)
            sent[i] = (uint8_t)next(&p);
    else if (how == 5 && share[1]) {
        static const uint32_t wrong[] = {0x7fc00000, 0x7f800000, 0xff800000};
        put(sent + begin + HEADER_BYTES + 4 * (next(&p) % (share[1] * WIDTH)), wrong[next(&p) % 3], 4);
        is_good = 0;
    } else if (how == 7) { /* it had to load what it was not asked for */
        num = begin + write_reply(sent + begin, 1, (e.seq + 1) & 0xffffffff, share[1], groups[1] + 1 + next(&p) % 64);
        is_good = 0;
    } else if (how == 8) { /* word of slowness that has a body */
        uint8_t *body = sent + begin - HEADER_BYTES * (begin > 0) + AT_BODY;
        put(body, get(body, 4) + 1 + next(&p), 4);
        words -= words > 0;
        is_good = 0;
    } else if (how == 6)
        num += write_reply(sent + num, 1, (e.seq + 1) & 0xffffffff, share[1], 0); /* nobody asked for that */
    if (share[1] || how == 4)
        MUST(!num || send(peers[1], sent, (size_t)num, 0) == num);
    else
        num = 0;
    if (next(&p) % 8 == 0)
        shutdown(peers[1], next(&p) & 1 ? SHUT_WR : SHUT_RDWR);
    int64_t waiting = unread(fds[1]);
    memset(out, 0xee, sizeof out);
    int done = collegium_exchange(&e);
    MUST((done < 0) == !is_in_range);
    if (done < 0) { /* nothing was done */
        for (int w = 0; w < WORKERS; w++)
            MUST(!unread(peers[w]) && !totals[6 * w]);
        MUST(unread(fds[1]) == waiting);
    } else {
        for (int w = 0; w < WORKERS; w++)
            MUST(states[w] >= UNSENT && states[w] <= SUSPECT && e.sizes[3 * w] == share[w] && e.sizes[3 * w + 1] == groups[w]);
        MUST(share[0] ? states[0] == DONE : states[0] == UNSENT); /* whatever the other does */
        MUST(!is_good || !share[1] || states[1] == DONE || states[1] == UNSENT); /* UNSENT: it has hung up */
        MUST((how != 1 && how != 7 && how != 8) || states[1] == SENT || states[1] == UNSENT);
        MUST(how != 5 || !share[1] || states[1] == SUSPECT || states[1] == UNSENT);
        if (states[1] == SENT && how != 2 && how != 4) /* what is for the caller to read is all there */
            MUST(unread(fds[1]) == (how == 3 && num < begin ? num % HEADER_BYTES : waiting - words * HEADER_BYTES) ||
                 !waiting);
        MUST(done == 0 || done == 1);
        MUST((done == 0) == ((!share[0] || states[0] == DONE) && (!share[1] || states[1] == DONE)));
        int64_t row[WORKERS] = {0};
        for (int64_t t = 0; t < T && !done; t++) {
            double total = 0;
            for (int w = 0; w < WORKERS; w++) {
                int is_of = 0;
                for (int64_t k = t * TOP; k < (t + 1) * TOP; k++)
                    is_of |= ids[k] >= 0 && ids[k] % WORKERS == w;
                if (is_of)
                    total += (double)++row[w] * (w ? 10.0 : 1.0);
            }
            for (int64_t d = 0; d < WIDTH && is_good; d++)
                MUST(out[t * WIDTH + d] == (float)total);
        }
    }
    for (int w = 0; w < WORKERS; w++) {
        close(fds[w]);
        close(peers[w]);
    }
    void *all[] = {e.sizes, e.tokens, e.scratch, e.experts, e.counts, e.pair_rows, e.pair_weights, e.gathered, e.replies, e.sums};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        free(all[i]);
    return 0;
}

#ifndef LIBFUZZER
int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 5;
    uint64_t state = argc > 2 ? strtoull(argv[2], NULL, 0) | 1 : 88172645463325252ULL;
    int64_t until = now_ns() + (int64_t)(seconds * 1e9), executions = 0;
    uint8_t data[512];
    while (now_ns() < until) {
        for (size_t i = 0; i < sizeof data; i++) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            data[i] = (uint8_t)(state >> 11);
        }
        LLVMFuzzerTestOneInput(data, state % sizeof data);
        executions++;
    }
    printf("%lld executions, none failed\n", (long long)executions);
    return 0;
}
#endif
