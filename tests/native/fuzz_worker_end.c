/* Feed a worker's end what routers may send, and worse, and hold that the router beside them is answered rightly.
 *
 * A case is a program of one-byte commands for three hostile links; between them the caller's side is played too: batches
 * are answered, failed and split, experts come and go, links are removed amid anything. Built with libFuzzer where clang has
 * it (-DLIBFUZZER), else with a generator of its own: fuzz_worker_end [seconds] [seed]. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rig.h"

enum { LINKS = 3, FRAME = HEADER_BYTES + 4 * MAX_PAIRS + 8 * MAX_PAIRS + MAX_ROWS * D * 4 + 2048 };

struct program {
    const uint8_t *at, *end;
};

static unsigned next(struct program *p)
{
    return p->at < p->end ? *p->at++ : 0;
}

static struct experts_rig experts;
static struct worker_end *worker;
static struct link *links[LINKS + 1]; /* the last is the canary's */
static int fds[LINKS + 1], worker_fds[LINKS + 1];
static int64_t stats[LINKS + 1][STATS], totals[TOTALS];
static uint8_t expected[4096];
static int64_t expected_bytes;
static float answers[64 * 16384 / 64];

static void open_link(int which, int small)
{
    int pair[2], size = 4096;
    MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
    if (small)
        setsockopt(pair[1], SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
    fds[which] = pair[0];
    worker_fds[which] = pair[1];
    memset(stats[which], 0, sizeof stats[which]);
    links[which] = collegium_end_add(worker, pair[1], which, AGREED, now_ns() / 1000, now_ns() / 1000, stats[which]);
    MUST(links[which]);
}

static void close_link(int which)
{
    collegium_end_remove(worker, links[which]);
    close(worker_fds[which]);
    close(fds[which]);
}

/* What Python does about what a call came back for. */
static void see_to(struct program *p, int why)
{
    int64_t words[32];
    if (why & ENDED)
        for (int i = 0; i <= LINKS; i++) {
            int64_t error;
            uint8_t head[HEADER_BYTES];
            const uint8_t *body;
            int reason = collegium_end_reason(links[i], &error, head);
            MUST(!reason || i < LINKS); /* never the canary's */
            if (!reason)
                continue;
            if (reason == 6)
                collegium_end_hint_body(links[i], &body);
            collegium_end_say(links[i], head, HEADER_BYTES);
            close_link(i);
            open_link(i, next(p) & 1);
        }
    struct slot *slot;
    if (why & ARRIVED)
        while ((slot = collegium_end_take(worker, 1, words)))
            collegium_end_reply(worker, slot, STATUS_BAD_FRAME, NULL, NULL, 0, 0, 0, "odd", 3);
    if (why & HINTS)
        while (collegium_end_hint(worker, words))
            ;
    collegium_end_noted(worker, words);
    collegium_end_drained(worker);
    if (!(why & BATCH))
        return;
    collegium_end_batch(worker, words);
    MUST(words[0] > 0 && words[1] < L && words[4] > 0 && words[4] <= E);
    const int64_t *pair_rows = (const int64_t *)(intptr_t)words[11];
    for (int64_t i = 0; i < words[3]; i++)
        MUST(pair_rows[i] >= 0 && pair_rows[i] < words[2]);
    if (next(p) & 1) { /* more comes, and links go, while the batch is in the caller's hands */
        int more = collegium_end_move(worker, 0);
        if (more & ENDED && next(p) & 1) {
            see_to(p, ENDED);
        }
        if (next(p) % 4 == 0) { /* all at once, and back one after another */
            for (int i = 0; i < LINKS; i++)
                close_link(i);
            for (int i = 0; i < LINKS; i++)
                open_link(i, 0);
        }
        collegium_end_progress(worker);
    }
    const uint16_t missed[] = {0, 3};
    switch (next(p) % 3) {
    case 0:
        memset(answers, 0, sizeof answers);
        collegium_end_answer(worker, (const uint8_t *)answers, missed, next(p) % 3, 0, 1000);
        break;
    case 1:
        collegium_end_fail(worker, STATUS_FAILED, "no", 2);
        break;
    default:
        collegium_end_split(worker);
        for (int i = 0; i < L * E; i++) /* or it comes back for ever */
            experts.table[i] = experts.memory[i];
    }
}

static void run(struct program *p)
{
    for (int turn = 0; turn < 64; turn++) {
        int why = collegium_end_run(worker, now_ns(), next(p) & 1);
        see_to(p, why);
        if (!why)
            return;
    }
}

static void send_some(int which, const uint8_t *bytes, int64_t num)
{
    (void)!send(fds[which], bytes, (size_t)num, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static int64_t read_some(int which, uint8_t *to, int64_t num)
{
    return recv(fds[which], to, (size_t)num, MSG_DONTWAIT);
}

/* The canary asks, and is answered as it was on a quiet worker. */
static void ask_canary(struct program *p)
{
    uint8_t frame[FRAME], reply[4096];
    for (int i = 0; i < L * E; i++)
        experts.table[i] = experts.memory[i];
    int64_t size = write_dispatch(frame, 7, 1, 3, 0xb, 0, INT64_MAX / 4), got = 0;
    MUST(send(fds[LINKS], frame, (size_t)size, MSG_NOSIGNAL) == size);
    for (int turn = 0; turn < 1000 && got < HEADER_BYTES + (int64_t)3 * D * 4; turn++) {
        see_to(p, collegium_end_run(worker, now_ns(), 0));
        int64_t taken = read_some(LINKS, reply + got, (int64_t)sizeof reply - got);
        got += taken > 0 ? taken : 0;
    }
    MUST(got == HEADER_BYTES + 3 * D * 4);
    MUST(reply[AT_KIND] == REPLY && get(reply + AT_SEQ, 8) == 7);
    if (reply[AT_STATUS] != STATUS_OK)
        return; /* joined with others into a batch that was failed above: it said so */
    if (!expected_bytes)
        memcpy(expected, reply + HEADER_BYTES, (size_t)(expected_bytes = got - HEADER_BYTES));
    MUST(!memcmp(expected, reply + HEADER_BYTES, (size_t)expected_bytes));
}

static void play(struct program *p)
{
    uint8_t frame[FRAME], sink[8192];
    while (p->at < p->end) {
        unsigned command = next(p), which = next(p) % LINKS;
        int64_t deadline = now_ns() / 1000 + 1000000, size = 0;
        switch (command % 12) {
        case 0: { /* anything at all */
            unsigned num = next(p);
            for (unsigned i = 0; i < num; i++)
                frame[i] = (uint8_t)next(p);
            send_some((int)which, frame, num);
            break;
        }
        case 1:
        case 2:
        case 3: /* a dispatch, whole or cut, as it should be or with some bytes changed */
            if (next(p) % 8 == 0)
                deadline = (int64_t)(next(p) * 0x0101010101010101ULL);
            size = write_dispatch(frame, next(p) % 8, (int)(next(p) % (L + 1)), 1 + (int)(next(p) % 16),
                                  1 + (int)(next(p) % 15), next(p) % 4 ? 0 : 55, deadline);
            break;
        case 4:
            size = write_hint(frame, (int)(next(p) % (L + 1)), 1 + (int)(next(p) % 15));
            break;
        case 5:
        case 6:
            run(p);
            break;
        case 7:
            while (read_some((int)which, sink, sizeof sink) > 0 && next(p) & 1)
                ;
            break;
        case 8: /* the router is gone; the worker finds out */
            shutdown(fds[which], next(p) & 1 ? SHUT_RDWR : SHUT_WR);
            break;
        case 9: /* the worker lets go */
            close_link((int)which);
            open_link((int)which, next(p) & 1);
            break;
        case 10:
            experts.table[next(p) % (L * E)] = NULL;
            break;
        default: { /* dispatches are taken one by one */
            int64_t words[32];
            see_to(p, collegium_end_move(worker, 0) & ~BATCH);
            struct slot *slot = collegium_end_take(worker, 0, words);
            if (!slot)
                break;
            if (next(p) & 1)
                close_link((int)which), open_link((int)which, 0);
            collegium_end_reply(worker, slot, words[13] ? STATUS_BAD_FRAME : STATUS_OK, (const uint8_t *)answers, NULL, 0, 1,
                                1, "odd", words[13] ? 3 : 0);
        }
        }
        if (!size)
            continue;
        unsigned changes = next(p) % 4;
        for (unsigned i = 0; i + 1 < changes; i++) {
            unsigned at = next(p) | (next(p) & 1) << 8;
            frame[at % (unsigned)size] = (uint8_t)next(p);
        }
        unsigned cut = next(p);
        send_some((int)which, frame, cut % 4 ? size : size * (cut / 4) / 64);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct program p = {data, data + size};
    if (!experts.memory[0]) {
        collegium_choose(2);
        make_experts(&experts);
    }
    static const int64_t num_experts[L] = {E, E, E};
    memset(experts.leases, 0, sizeof experts.leases);
    memset(totals, 0, sizeof totals);
    for (int i = 0; i < L * E; i++)
        experts.table[i] = experts.memory[i];
    worker = collegium_end_new(-1, next(&p) & 1 ? 1 << 20 : 16384, 1000000000, 1000000000, totals);
    MUST(worker && !collegium_end_serve(worker, &experts.shape, experts.table, experts.leases, num_experts, L, E, D,
                                        FLOAT32, 1, 1));
    for (int i = 0; i <= LINKS; i++)
        open_link(i, 0);
    struct program none = {data, data};
    if (!expected_bytes)
        ask_canary(&none);
    play(&p);
    for (int i = 0; i < LINKS; i++) { /* whatever is unfinished goes with its link */
        close_link(i);
        open_link(i, 0);
    }
    ask_canary(&none);
    for (int i = 0; i < L * E; i++)
        MUST(!experts.leases[i]);
    for (int i = 0; i <= LINKS; i++)
        close_link(i);
    MUST(collegium_end_used(worker) == 0);
    collegium_end_free(worker);
    return 0;
}

#ifndef LIBFUZZER
static uint64_t state;

static uint64_t draw(void)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

int main(int argc, char **argv)
{
    double seconds = argc > 1 ? atof(argv[1]) : 5;
    state = argc > 2 ? strtoull(argv[2], NULL, 0) | 1 : 88172645463325252ULL;
    int64_t until = now_ns() + (int64_t)(seconds * 1e9), executions = 0;
    uint8_t data[1024];
    while (now_ns() < until) {
        size_t size = draw() % sizeof data;
        for (size_t i = 0; i < size; i++)
            data[i] = (uint8_t)(draw() >> 11);
        LLVMFuzzerTestOneInput(data, size);
        executions++;
    }
    free_experts(&experts);
    printf("%lld executions, none failed\n", (long long)executions);
    return 0;
}
#endif
