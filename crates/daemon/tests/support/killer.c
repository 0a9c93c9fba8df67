/* Kills a process at one of its steps on disk; tests preload it into the daemon.
 *
 * A step is the moment before a call that changes something beneath the directory SOCI_KILL_ROOT, and for calls that make
 * something visible or durable also the moment after it: what lies between two calls (an answer) is between two steps. Steps
 * count from 1 as soon as the file SOCI_KILL_LOG exists. At number SOCI_KILL_AT, or at the first whose path beneath the root
 * matches the pattern SOCI_KILL_WHERE, that file is renamed with ".taken" at its end, the step is written to it, and the process
 * gets SIGKILL. Whoever removes the file before it is renamed has the process live on.
 *
 * The moments before are seen by a thread that the kernel asks at each such call (seccomp's user notification), whoever makes
 * it: unpacking and mounting pass the C library by. The moments after are seen as functions of that library. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *root, *log_path, *kill_where;
static char taken[PATH_MAX];
static long kill_at;
static int armed;
static atomic_long steps;

/* Whether `path`, relative to the directory `dir` or that of the process, is beneath the root; made absolute. */
static int beneath(int dir, const char *path, char *full) {
    size_t length = 0;
    int end = 0;
    /* A path through the process's own descriptors. */
    if (sscanf(path, "/proc/self/fd/%d%n", &dir, &end) == 1 && end) path += end + (path[end] == '/');
    if (path[0] != '/') {
        char link[64];
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        ssize_t read = readlink(link, full, PATH_MAX - 1);
        if (read < 0) return 0;
        length = (size_t)read;
        if (path[0] != 0) full[length++] = '/';
    }
    snprintf(full + length, PATH_MAX - length, "%s", path);
    size_t prefix = strlen(root);
    return strncmp(full, root, prefix) == 0 && full[prefix] == '/';
}

static void step(const char *moment, const char *call, const char *path) {
    int saved = errno;
    const char *where = path + strlen(root) + 1;
    if (syscall(SYS_faccessat, AT_FDCWD, log_path, F_OK) == 0 &&
        (kill_where ? fnmatch(kill_where, where, 0) == 0 : atomic_fetch_add(&steps, 1) + 1 == kill_at) &&
        syscall(SYS_renameat2, AT_FDCWD, log_path, AT_FDCWD, taken, 0) == 0) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s %s\n", moment, call, where);
        long log = syscall(SYS_openat, AT_FDCWD, taken, O_WRONLY | O_APPEND, 0);
        syscall(SYS_write, log, line, length);
        for (;;) kill(getpid(), SIGKILL);
    }
    errno = saved;
}

/* A call that changes something: which arguments are the directory, or the file itself, and the path; NONE for none. */
#define NONE (-1)
static const struct call {
    long number;
    const char *name;
    int dir, path;
} calls[] = {
#define CALL(name, dir, path) {SYS_##name, #name, dir, path}
#ifdef SYS_mkdir /* The older ones, which newer machines do not have. */
    CALL(mkdir, NONE, 0), CALL(rmdir, NONE, 0), CALL(unlink, NONE, 0), CALL(symlink, NONE, 1), CALL(link, NONE, 1),
    CALL(rename, NONE, 1), CALL(chmod, NONE, 0), CALL(chown, NONE, 0), CALL(lchown, NONE, 0), CALL(mknod, NONE, 0),
    CALL(open, NONE, 0),
#endif
    CALL(openat, 0, 1), CALL(mkdirat, 0, 1), CALL(unlinkat, 0, 1), CALL(symlinkat, 1, 2), CALL(linkat, 2, 3),
    CALL(renameat, 2, 3), CALL(renameat2, 2, 3), CALL(mknodat, 0, 1), CALL(fchmodat, 0, 1), CALL(fchownat, 0, 1),
    CALL(utimensat, 0, 1), CALL(setxattr, NONE, 0), CALL(lsetxattr, NONE, 0), CALL(mount, NONE, 1), CALL(umount2, NONE, 0),
    CALL(fchmod, 0, NONE), CALL(fchown, 0, NONE), CALL(fsetxattr, 0, NONE), CALL(ftruncate, 0, NONE), CALL(write, 0, NONE),
    CALL(pwrite64, 0, NONE), CALL(fsync, 0, NONE), CALL(fdatasync, 0, NONE), CALL(syncfs, 0, NONE),
};
enum { CALLS = sizeof calls / sizeof *calls };

/* Opening changes something only where it may create or cut. */
static int changes(const struct seccomp_data *data) {
    int flags = O_CREAT;
    if (data->nr == SYS_openat) flags = (int)data->args[2];
#ifdef SYS_open
    if (data->nr == SYS_open) flags = (int)data->args[1];
#endif
    return flags & (O_CREAT | O_TRUNC);
}

static void asked(const struct seccomp_data *data) {
    char full[PATH_MAX];
    for (int i = 0; i < CALLS; i++) {
        if (calls[i].number != data->nr || !changes(data)) continue;
        int dir = calls[i].dir == NONE ? AT_FDCWD : (int)data->args[calls[i].dir];
        const char *path = calls[i].path == NONE ? NULL : (const char *)data->args[calls[i].path];
        if (beneath(dir, path ? path : "", full)) step("before", calls[i].name, full);
    }
}

static atomic_int listener = -1;

/* Has the kernel go on with each call, after a look at it. This thread itself is not asked about. */
static void *watch(void *unused) {
    /* The kernel's structures, which may have grown since they were known here. */
    union { struct seccomp_notif seen; char room[1024]; } question;
    union { struct seccomp_notif_resp go; char room[1024]; } answer;
    int from;
    while ((from = atomic_load(&listener)) < 0) sched_yield();
    for (;;) {
        memset(&question, 0, sizeof question);
        memset(&answer, 0, sizeof answer);
        if (ioctl(from, SECCOMP_IOCTL_NOTIF_RECV, &question) < 0) continue;
        /* Not a child, whose memory is another. */
        if (syscall(SYS_tgkill, getpid(), question.seen.pid, 0) == 0) asked(&question.seen.data);
        answer.go.id = question.seen.id;
        answer.go.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
        ioctl(from, SECCOMP_IOCTL_NOTIF_SEND, &answer);
    }
    return unused;
}

/* Has the kernel ask about this thread and those that it starts. */
static long ask(void) {
    struct sock_filter filter[2 * CALLS + 2], *at = filter;
    *at++ = (struct sock_filter)BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr));
    for (int i = 0; i < CALLS; i++) {
        *at++ = (struct sock_filter)BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, (unsigned)calls[i].number, 0, 1);
        *at++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF);
    }
    *at++ = (struct sock_filter)BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW);
    struct sock_fprog program = {(unsigned short)(at - filter), filter};
    return syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
}

__attribute__((constructor)) static void begin(void) {
    const char *at = getenv("SOCI_KILL_AT");
    root = getenv("SOCI_KILL_ROOT");
    log_path = getenv("SOCI_KILL_LOG");
    kill_where = getenv("SOCI_KILL_WHERE");
    kill_at = at ? atol(at) : 0;
    armed = root && log_path && (kill_at || kill_where);
    if (armed) snprintf(taken, sizeof taken, "%s.taken", log_path);
    if (!armed) return;
    pthread_t thread;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int started = pthread_create(&thread, NULL, watch, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    long from = started == 0 ? ask() : -1;
    if (from < 0) {
        perror("killer: the kernel does not let itself be asked about system calls");
        _exit(1);
    }
    atomic_store(&listener, (int)from);
}

#define AFTER(type, name, parameters, arguments, dir, path)            \
    type name parameters {                                             \
        static type(*real) parameters;                                 \
        char full[PATH_MAX];                                           \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        type result = real arguments;                                  \
        if (armed && beneath(dir, path, full)) step("after", #name, full); \
        return result;                                                 \
    }

AFTER(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to)
AFTER(int, fsync, (int file), (file), file, "")
AFTER(int, fdatasync, (int file), (file), file, "")
