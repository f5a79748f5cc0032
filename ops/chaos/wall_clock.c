/* A time of day that jumps: for LD_PRELOAD. How far it is off is in a file, as nanoseconds in eight bytes, which may
 * change at any time.
 *
 * It is off for all code of a Python process but Ray's core, which shares its time with processes that are not Python.
 * Who is told a time that is off also names deadlines by it: these are put right again, so that waits take as long as
 * they are meant to. Other clocks are left alone. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SECOND 1000000000LL
#define RIGHT_PATH "/ray/"
#define SLOTS 4096

static const volatile int64_t *off_ns;
/* Of callers, by their address: itself where their clock is off, with its highest bit set where it is right. */
static uintptr_t callers[SLOTS];
#define IS_RIGHT ((uintptr_t)1 << (8 * sizeof(uintptr_t) - 1))

__attribute__((constructor)) static void begin(void) {
    char program[4096];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    const char *path = getenv("OCTET_WALL_CLOCK");
    if (length <= 0 || path == NULL)
        return;
    program[length] = 0;
    const char *name = strrchr(program, '/');
    if (name == NULL || strncmp(name + 1, "python", 6) != 0)
        return;
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return;
    void *shared = mmap(NULL, sizeof *off_ns, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (shared != MAP_FAILED)
        off_ns = shared;
}

/* How far the clock is off for whoever has called from there. */
static int64_t off_at(const void *from) {
    int64_t ns = off_ns != NULL ? *off_ns : 0;
    if (ns == 0)
        return 0;
    uintptr_t address = (uintptr_t)from;
    uintptr_t *slot = &callers[(address >> 2) % SLOTS];
    uintptr_t known = __atomic_load_n(slot, __ATOMIC_RELAXED);
    if ((known & ~IS_RIGHT) != address) {
        Dl_info found;
        int right = dladdr(from, &found) != 0 && found.dli_fname != NULL && strstr(found.dli_fname, RIGHT_PATH) != NULL;
        known = right ? address | IS_RIGHT : address;
        __atomic_store_n(slot, known, __ATOMIC_RELAXED);
    }
    return known & IS_RIGHT ? 0 : ns;
}
#define OFF off_at(__builtin_return_address(0))

static struct timespec later(struct timespec at, int64_t ns) {
    int64_t fine = at.tv_nsec + ns % SECOND;
    at.tv_sec += ns / SECOND + (fine >= SECOND) - (fine < 0);
    at.tv_nsec = fine + (fine < 0) * SECOND - (fine >= SECOND) * SECOND;
    /* What was over long ago is over still. */
    return at.tv_sec < 0 ? (struct timespec){0, 0} : at;
}

static int of_day(clockid_t clock) { return clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE; }

/* The function that would be called without this file. */
static void *next(const char *name, const char *version) {
    void *found = version != NULL ? dlvsym(RTLD_NEXT, name, version) : NULL;
    return found != NULL ? found : dlsym(RTLD_NEXT, name);
}
#define NEXT(name, version, ...)                                                                                       \
    static int (*real)(__VA_ARGS__);                                                                                   \
    if (real == NULL)                                                                                                  \
        real = (int (*)(__VA_ARGS__))next(name, version)

int clock_gettime(clockid_t clock, struct timespec *now) {
    NEXT("clock_gettime", NULL, clockid_t, struct timespec *);
    int failed = real(clock, now);
    if (failed == 0 && of_day(clock))
        *now = later(*now, OFF);
    return failed;
}

/* Without a call of the function above, which would be asked from here. */
static struct timespec now_for(int64_t off) {
    struct timespec now;
    NEXT("clock_gettime", NULL, clockid_t, struct timespec *);
    real(CLOCK_REALTIME, &now);
    return later(now, off);
}

int gettimeofday(struct timeval *now, void *zone) {
    struct timespec found = now_for(OFF);
    if (zone != NULL)
        memset(zone, 0, sizeof(struct timezone));
    *now = (struct timeval){found.tv_sec, found.tv_nsec / 1000};
    return 0;
}

time_t time(time_t *now) {
    time_t found = now_for(OFF).tv_sec;
    if (now != NULL)
        *now = found;
    return found;
}

int timespec_get(struct timespec *now, int base) {
    if (base != TIME_UTC)
        return 0;
    *now = now_for(OFF);
    return base;
}

/* std::chrono::system_clock::now(), which would otherwise ask for its callers. */
int64_t _ZNSt6chrono3_V212system_clock3nowEv(void) {
    struct timespec now = now_for(OFF);
    return now.tv_sec * SECOND + now.tv_nsec;
}

int pthread_cond_timedwait(pthread_cond_t *condition, pthread_mutex_t *mutex, const struct timespec *until) {
    NEXT("pthread_cond_timedwait", "GLIBC_2.3.2", pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    /* A condition knows its clock: with this bit it is the steady one. */
    struct timespec right = later(*until, condition->__data.__wrefs & 2 ? 0 : -OFF);
    return real(condition, mutex, &right);
}

int pthread_cond_clockwait(pthread_cond_t *condition, pthread_mutex_t *mutex, clockid_t clock,
                           const struct timespec *until) {
    NEXT("pthread_cond_clockwait", NULL, pthread_cond_t *, pthread_mutex_t *, clockid_t, const struct timespec *);
    struct timespec right = later(*until, of_day(clock) ? -OFF : 0);
    return real(condition, mutex, clock, &right);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const struct timespec *until) {
    NEXT("pthread_mutex_timedlock", NULL, pthread_mutex_t *, const struct timespec *);
    struct timespec right = later(*until, -OFF);
    return real(mutex, &right);
}

int sem_timedwait(sem_t *semaphore, const struct timespec *until) {
    NEXT("sem_timedwait", NULL, sem_t *, const struct timespec *);
    struct timespec right = later(*until, -OFF);
    return real(semaphore, &right);
}

int sem_clockwait(sem_t *semaphore, clockid_t clock, const struct timespec *until) {
    NEXT("sem_clockwait", NULL, sem_t *, clockid_t, const struct timespec *);
    struct timespec right = later(*until, of_day(clock) ? -OFF : 0);
    return real(semaphore, clock, &right);
}

int clock_nanosleep(clockid_t clock, int flags, const struct timespec *until, struct timespec *left) {
    NEXT("clock_nanosleep", NULL, clockid_t, int, const struct timespec *, struct timespec *);
    struct timespec right = later(*until, of_day(clock) && flags & TIMER_ABSTIME ? -OFF : 0);
    return real(clock, flags, &right, left);
}

/* As libraries call futexes. */
long syscall(long number, ...) {
    static long (*real)(long, ...);
    if (real == NULL)
        real = (long (*)(long, ...))next("syscall", NULL);
    va_list list;
    va_start(list, number);
    long of[6];
    for (int i = 0; i < 6; i++)
        of[i] = va_arg(list, long);
    va_end(list);
    const struct timespec *until = (const struct timespec *)of[3];
    int64_t off;
    if (number == SYS_futex && until != NULL && of[1] & FUTEX_CLOCK_REALTIME &&
        (of[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (off = OFF) != 0) {
        struct timespec right = later(*until, -off);
        return real(number, of[0], of[1], of[2], &right, of[4], of[5]);
    }
    return real(number, of[0], of[1], of[2], of[3], of[4], of[5]);
}
