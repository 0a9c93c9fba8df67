/* Kills a process at one of its steps on disk; tests preload it into the daemon.
 *
 * A step is the moment before a call that changes something beneath the directory SOCI_KILL_ROOT, and for calls that make
 * something visible or durable also the moment after it: what lies between two calls (a mount, an answer) is between two
 * steps. Steps count from 1 as soon as the file SOCI_KILL_LOG exists. At number SOCI_KILL_AT, or at the first whose path
 * beneath the root matches the pattern SOCI_KILL_WHERE, the step is written to that file, and the process gets SIGKILL. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static const char *root, *log_path, *kill_where;
static long kill_at;
static int armed;
static atomic_long steps;

__attribute__((constructor)) static void begin(void) {
    const char *at = getenv("SOCI_KILL_AT");
    root = getenv("SOCI_KILL_ROOT");
    log_path = getenv("SOCI_KILL_LOG");
    kill_where = getenv("SOCI_KILL_WHERE");
    kill_at = at ? atol(at) : 0;
    armed = root && log_path && (kill_at || kill_where);
}

/* Whether `path`, relative to the directory `dir` or that of the process, is beneath the root; made absolute. */
static int beneath(int dir, const char *path, char *full) {
    size_t length = 0;
    if (!armed) return 0;
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
    if (syscall(SYS_access, log_path, F_OK) == 0 &&
        (kill_where ? fnmatch(kill_where, where, 0) == 0 : atomic_fetch_add(&steps, 1) + 1 == kill_at)) {
        char line[PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%s %s %s\n", moment, call, where);
        long log = syscall(SYS_openat, AT_FDCWD, log_path, O_WRONLY | O_APPEND, 0);
        syscall(SYS_write, log, line, length);
        for (;;) kill(getpid(), SIGKILL);
    }
    errno = saved;
}

#define AROUND(type, name, parameters, arguments, dir, path, visible)        \
    type name parameters {                                                   \
        static type(*real) parameters;                                       \
        char full[PATH_MAX];                                                 \
        if (!real) real = (type(*) parameters)dlsym(RTLD_NEXT, #name);       \
        int ours = beneath(dir, path, full);                                 \
        if (ours) step("before", #name, full);                               \
        type result = real arguments;                                        \
        if (ours && visible) step("after", #name, full);                     \
        return result;                                                       \
    }

AROUND(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
AROUND(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0)
AROUND(int, rmdir, (const char *path), (path), AT_FDCWD, path, 0)
AROUND(int, unlink, (const char *path), (path), AT_FDCWD, path, 0)
AROUND(int, unlinkat, (int dir, const char *path, int flags), (dir, path, flags), dir, path, 0)
AROUND(int, symlink, (const char *to, const char *path), (to, path), AT_FDCWD, path, 0)
AROUND(int, chmod, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 0)
AROUND(int, lchown, (const char *path, uid_t user, gid_t group), (path, user, group), AT_FDCWD, path, 0)
AROUND(int, fsync, (int file), (file), file, "", 1)
AROUND(int, fdatasync, (int file), (file), file, "", 1)
AROUND(int, ftruncate64, (int file, off64_t size), (file, size), file, "", 0)
AROUND(ssize_t, write, (int file, const void *from, size_t size), (file, from, size), file, "", 0)
AROUND(ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t at), (file, from, size, at), file, "", 0)

/* Opening changes something only where it may create or cut. */
static mode_t mode_of(int flags, va_list more) { return flags & (O_CREAT | O_TMPFILE) ? va_arg(more, mode_t) : 0; }

int open64(const char *path, int flags, ...) {
    static int (*real)(const char *, int, ...);
    char full[PATH_MAX];
    va_list more;
    va_start(more, flags);
    mode_t mode = mode_of(flags, more);
    va_end(more);
    if (!real) real = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, "open64");
    if (flags & (O_CREAT | O_TRUNC) && beneath(AT_FDCWD, path, full)) step("before", "open", full);
    return real(path, flags, mode);
}
