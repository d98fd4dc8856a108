/* Under a race detector: a worker's end computes with helper threads while another thread takes experts out and puts them
 * back, waiting for leases as the buffer does, and a third asks. thread_worker_end [seconds] */

#define _GNU_SOURCE
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include "rig.h"

static struct experts_rig experts;
static volatile int is_over;
static int64_t num_taken_out;

/* The buffer: an expert leaves the table, and its memory is written only when nobody computes from it. */
static void *churn(void *unused)
{
    (void)unused;
    for (uint64_t turn = 1; !__atomic_load_n(&is_over, __ATOMIC_ACQUIRE); turn++) {
        int at = (int)(turn * 7 % (L * E));
        __atomic_store_n(&experts.table[at], NULL, __ATOMIC_SEQ_CST);
        while (__atomic_load_n(&experts.leases[at], __ATOMIC_SEQ_CST))
            usleep(50);
        uint8_t first = experts.memory[at][0];
        memset(experts.memory[at], first, 1); /* a write that a computing thread must not see */
        __atomic_store_n(&experts.table[at], experts.memory[at], __ATOMIC_SEQ_CST);
        num_taken_out++;
        usleep(20);
    }
    return NULL;
}

static void *ask(void *at)
{
    int fd = *(int *)at;
    uint8_t frame[8192], reply[4096];
    for (uint64_t seq = 1; !__atomic_load_n(&is_over, __ATOMIC_ACQUIRE); seq++) {
        int rows = 1 + (int)(seq % 8);
        int64_t size = write_dispatch(frame, seq, (int)(seq % L), rows, 0xf, 0, INT64_MAX / 4), wanted = HEADER_BYTES + rows * D * 4;
        MUST(send(fd, frame, (size_t)size, MSG_NOSIGNAL) == size);
        for (int64_t got = 0, taken; got < wanted; got += taken)
            if ((taken = recv(fd, reply + got, (size_t)(wanted - got), 0)) <= 0)
                return NULL;
        MUST(get(reply + AT_SEQ, 8) == seq);
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static const int64_t num_experts[L] = {E, E, E};
    static float zeros[MAX_ROWS * D * 4];
    int64_t totals[TOTALS] = {0}, stats[2][STATS] = {{0}}, until = now_ns() + (int64_t)((argc > 1 ? atof(argv[1]) : 5) * 1e9);
    int pairs[2][2];
    collegium_choose(2);
    make_experts(&experts);
    struct worker_end *worker = collegium_end_new(-1, 1 << 20, INT64_C(1) << 40, INT64_C(1) << 40, totals);
    MUST(worker && !collegium_end_serve(worker, &experts.shape, experts.table, experts.leases, num_experts, L, E, D,
                                        FLOAT32, 2, 1));
    pthread_t threads[3];
    struct link *links[2];
    for (int i = 0; i < 2; i++) {
        MUST(!socketpair(AF_UNIX, SOCK_STREAM, 0, pairs[i]));
        links[i] = collegium_end_add(worker, pairs[i][1], i, AGREED, now_ns() / 1000, now_ns() / 1000, stats[i]);
        MUST(links[i] && !pthread_create(&threads[i], NULL, ask, &pairs[i][0]));
    }
    MUST(!pthread_create(&threads[2], NULL, churn, NULL));
    while (now_ns() < until) {
        int why = collegium_end_run(worker, now_ns() + 10000000, 1);
        int64_t words[16];
        if (why & BATCH) { /* an expert was out: any answer does here */
            collegium_end_batch(worker, words);
            collegium_end_answer(worker, (const uint8_t *)zeros, NULL, 0, 0, 1);
        }
        collegium_end_noted(worker, words);
        collegium_end_drained(worker);
    }
    __atomic_store_n(&is_over, 1, __ATOMIC_RELEASE);
    for (int i = 0; i < 2; i++) {
        collegium_end_remove(worker, links[i]);
        close(pairs[i][1]);
        shutdown(pairs[i][0], SHUT_RDWR);
    }
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    collegium_end_free(worker);
    free_experts(&experts);
    MUST(totals[0] > 100 && num_taken_out > 100);
    printf("%lld dispatches answered while experts were taken out %lld times\n", (long long)totals[0], (long long)num_taken_out);
    return 0;
}
