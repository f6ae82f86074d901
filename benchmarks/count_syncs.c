/* Counts, and on demand delays, every sync of a process. Preloaded by benchmarks/ack.py. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <time.h>

static atomic_long syncs;

long count_syncs(void) { return atomic_load(&syncs); }

static void met(void) {
    const char *delay_us = getenv("SYNC_DELAY_US");
    atomic_fetch_add(&syncs, 1);
    if (delay_us) {
        long us = atol(delay_us);
        struct timespec pause = {us / 1000000, us % 1000000 * 1000};
        nanosleep(&pause, NULL);
    }
}

int fsync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fsync");
    met();
    return real(fd);
}

int fdatasync(int fd) {
    int (*real)(int) = dlsym(RTLD_NEXT, "fdatasync");
    met();
    return real(fd);
}
