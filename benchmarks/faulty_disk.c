/* Makes the n-th change of files below a folder fail, whatever library makes it.

   Preloaded (LD_PRELOAD) by faulty_disk.py. NEUCLIP_FAULT_ROOT is the folder, NEUCLIP_FAULT_PLAN
   a file of five 64-bit integers that all processes share: the number of changes so far, the
   number of the one that fails (0: none), its errno, what fails after it, and whether one failed.
   A change that fills the disk is cut in half first, as the kernel does it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { ONCE, FULL, READ_ONLY };   /* what fails after the first failure */
enum { GROWS, KEEPS, REMOVES };   /* what a change does with the room on the disk */

struct plan { int64_t count, at, error, after, failed; };

static struct plan *plan;
static char root[4096];
static size_t root_length;

__attribute__((constructor)) static void start(void) {
  const char *file = getenv("NEUCLIP_FAULT_PLAN"), *folder = getenv("NEUCLIP_FAULT_ROOT");
  if (!file || !folder || strlen(folder) >= sizeof root) return;
  int handle = open(file, O_RDWR | O_CLOEXEC);
  if (handle < 0) return;
  void *shared = mmap(NULL, sizeof *plan, PROT_READ | PROT_WRITE, MAP_SHARED, handle, 0);
  close(handle);
  if (shared == MAP_FAILED) return;
  strcpy(root, folder);
  root_length = strlen(folder);
  plan = shared;
}

static int below(const char *path) {
  return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || !path[root_length]);
}

static int path_below(const char *path) { return plan && path && below(path); }

static int handle_below(int handle) {
  if (!plan) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", handle);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

/* Counts a change; 0: it may happen; 1: it fails; 2: it fails as the first. */
static int fails(int kind) {
  int64_t number = __atomic_add_fetch(&plan->count, 1, __ATOMIC_SEQ_CST), at = plan->at;
  if (!at || number < at) return 0;
  int room = plan->after != FULL || kind != REMOVES;   /* a full disk lets files go */
  int now = plan->after == FULL ? kind == GROWS : plan->after == READ_ONLY;
  if (number == at ? !room : !now) return 0;
  plan->failed = 1;
  errno = (int)plan->error;
  return number == at ? 2 : 1;
}

#define NEXT(name) \
  static __typeof__(&name) next; \
  if (!next) next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

#define OPEN(name) \
  int name(const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && path_below(path) \
        && fails(access(path, F_OK) ? GROWS : KEEPS)) return -1; \
    return next(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
  int name(int folder, const char *path, int flags, ...) { \
    NEXT(name); \
    va_list rest; \
    va_start(rest, flags); \
    mode_t mode = flags & (O_CREAT | __O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest); \
    if (flags & (O_WRONLY | O_RDWR | O_CREAT) && path_below(path) \
        && fails(access(path, F_OK) ? GROWS : KEEPS)) return -1; \
    return next(folder, path, flags, mode); \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name) \
  FILE *name(const char *path, const char *mode) { \
    NEXT(name); \
    if (strpbrk(mode, "wa+") && path_below(path) && fails(GROWS)) return NULL; \
    return next(path, mode); \
  }
FOPEN(fopen)
FOPEN(fopen64)

ssize_t write(int handle, const void *data, size_t size) {
  NEXT(write);
  if (handle_below(handle)) {
    int first = fails(GROWS);
    if (first == 2 && plan->after == FULL && size > 1) return next(handle, data, size / 2);
    if (first) return -1;
  }
  return next(handle, data, size);
}

#define PWRITE(name, offset_type) \
  ssize_t name(int handle, const void *data, size_t size, offset_type offset) { \
    NEXT(name); \
    if (handle_below(handle) && fails(GROWS)) return -1; \
    return next(handle, data, size, offset); \
  }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int handle, const struct iovec *parts, int number) {
  NEXT(writev);
  if (handle_below(handle) && fails(GROWS)) return -1;
  return next(handle, parts, number);
}

size_t fwrite(const void *data, size_t size, size_t number, FILE *file) {
  NEXT(fwrite);
  if (handle_below(fileno(file)) && fails(GROWS)) return 0;
  return next(data, size, number, file);
}

#define ON_HANDLE(name, kind, parameters, ...) \
  int name parameters { \
    NEXT(name); \
    if (handle_below(handle) && fails(kind)) return -1; \
    return next(__VA_ARGS__); \
  }
ON_HANDLE(fsync, KEEPS, (int handle), handle)
ON_HANDLE(fdatasync, KEEPS, (int handle), handle)
ON_HANDLE(ftruncate, GROWS, (int handle, off_t size), handle, size)
ON_HANDLE(ftruncate64, GROWS, (int handle, off64_t size), handle, size)

ssize_t sendfile(int handle, int from, off_t *offset, size_t size);
ssize_t sendfile(int handle, int from, off_t *offset, size_t size) {
  NEXT(sendfile);
  if (handle_below(handle) && fails(GROWS)) return -1;
  return next(handle, from, offset, size);
}

#define ON_PATH(name, kind, changed, parameters, ...) \
  int name parameters { \
    NEXT(name); \
    if (path_below(changed) && fails(kind)) return -1; \
    return next(__VA_ARGS__); \
  }
ON_PATH(mkdir, GROWS, path, (const char *path, mode_t mode), path, mode)
ON_PATH(rename, KEEPS, to, (const char *path, const char *to), path, to)
ON_PATH(link, GROWS, to, (const char *path, const char *to), path, to)
ON_PATH(symlink, GROWS, to, (const char *path, const char *to), path, to)
ON_PATH(truncate, GROWS, path, (const char *path, off_t size), path, size)
ON_PATH(truncate64, GROWS, path, (const char *path, off64_t size), path, size)
ON_PATH(unlink, REMOVES, path, (const char *path), path)
ON_PATH(rmdir, REMOVES, path, (const char *path), path)

int linkat(int a, const char *path, int b, const char *to, int flags) {
  NEXT(linkat);
  if (path_below(to) && fails(GROWS)) return -1;
  return next(a, path, b, to, flags);
}
