/* A model server that answers as fast as it can: the mock's prebuilt answers from a file.
 *
 *     c_upstream PORT ANSWERS        prints {"port":N} once it listens on 127.0.0.1
 *
 * c_upstream.py makes the file and says what is in it. Each write of an answer is one send(2), so
 * that events arrive as a model server's do; a reader that is too slow holds up all others. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

enum { KINDS = 3, MOST = 1 << 20, PATIENCE_MS = 5000 };
enum kind { JSON, STREAM, STREAM_WITH_USAGE };

struct answer { uint32_t writes; const char *data; };
struct kind_of_answer { uint32_t count, next; struct answer *answers; } kinds[KINDS];
struct connection { int fd; size_t size, room; char *buffer; };

static void fail(const char *what) { perror(what); exit(3); }

static uint32_t take(const char **at) {
    uint32_t value;
    memcpy(&value, *at, 4);
    *at += 4;
    return value;
}

static void read_answers(const char *path) {
    struct stat status;
    int fd = open(path, O_RDONLY);
    if (fd < 0 || fstat(fd, &status)) fail(path);
    const char *at = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
    if (at == MAP_FAILED) fail(path);
    for (int kind = 0; kind < KINDS; kind++) {
        uint32_t count = kinds[kind].count = take(&at);
        kinds[kind].answers = calloc(count, sizeof(struct answer));
        for (uint32_t number = 0; number < count; number++) {
            struct answer *answer = &kinds[kind].answers[number];
            answer->writes = take(&at);
            answer->data = at;
            for (uint32_t write = 0; write < answer->writes; write++) {
                uint32_t size = take(&at);
                at += size;
            }
        }
    }
}

static int send_all(int fd, const char *data, size_t size) {
    while (size) {
        ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
        if (sent < 0 && errno == EAGAIN) {
            struct pollfd room = {fd, POLLOUT, 0};
            if (poll(&room, 1, PATIENCE_MS) > 0) continue;
        }
        if (sent < 0) return -1;
        data += sent;
        size -= sent;
    }
    return 0;
}

static int send_answer(int fd, enum kind kind) {
    struct kind_of_answer *known = &kinds[kind];
    struct answer *answer = &known->answers[known->next++ % known->count];
    const char *at = answer->data;
    for (uint32_t write = 0; write < answer->writes; write++) {
        uint32_t size = take(&at);
        if (send_all(fd, at, size)) return -1;
        at += size;
    }
    return 0;
}

static enum kind kind_of(const char *body) {
    if (!strstr(body, "\"stream\":true")) return JSON;
    return strstr(body, "\"include_usage\":true") ? STREAM_WITH_USAGE : STREAM;
}

/* Answer all whole requests of the buffer; -1 ends the connection. */
static int answer_requests(struct connection *peer) {
    for (;;) {
        peer->buffer[peer->size] = 0;
        char *end = strstr(peer->buffer, "\r\n\r\n");
        if (!end) return peer->size < MOST ? 0 : -1;
        char *body = end + 4, *length = strcasestr(peer->buffer, "\r\ncontent-length:");
        size_t whole = body - peer->buffer + (length && length < end ? atol(length + 17) : 0);
        if (whole > peer->size) return whole < MOST ? 0 : -1;
        char kept = peer->buffer[whole];
        peer->buffer[whole] = 0;
        enum kind kind = kind_of(body);
        peer->buffer[whole] = kept;
        if (send_answer(peer->fd, kind)) return -1;
        memmove(peer->buffer, peer->buffer + whole, peer->size -= whole);
    }
}

static int read_requests(struct connection *peer) {
    if (peer->room - peer->size < 65536) {
        peer->room = 2 * peer->room + 65536;
        if (!(peer->buffer = realloc(peer->buffer, peer->room + 1))) fail("realloc");
    }
    ssize_t got = recv(peer->fd, peer->buffer + peer->size, peer->room - peer->size, 0);
    if (got < 0 && errno == EAGAIN) return 0;
    if (got <= 0) return -1;
    peer->size += got;
    return answer_requests(peer);
}

static void accept_one(int poller, int listener) {
    int one = 1, fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) return;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct connection *peer = calloc(1, sizeof *peer);
    peer->fd = fd;
    struct epoll_event event = {EPOLLIN, {.ptr = peer}};
    if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event)) fail("epoll_ctl");
}

static int listen_on(uint16_t port) {
    struct sockaddr_in address = {AF_INET, htons(port), {htonl(INADDR_LOOPBACK)}, {0}};
    socklen_t size = sizeof address;
    int one = 1, listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
    if (bind(listener, (struct sockaddr *)&address, size) || listen(listener, 4096)) fail("bind");
    getsockname(listener, (struct sockaddr *)&address, &size);
    printf("{\"port\":%d}\n", ntohs(address.sin_port));
    fflush(stdout);
    return listener;
}

int main(int count, char **arguments) {
    if (count != 3) return fputs("expected a port and a file of answers\n", stderr), 2;
    read_answers(arguments[2]);
    int poller = epoll_create1(EPOLL_CLOEXEC), listener = listen_on(atoi(arguments[1]));
    struct epoll_event event = {EPOLLIN, {.ptr = NULL}}, events[256];
    if (epoll_ctl(poller, EPOLL_CTL_ADD, listener, &event)) fail("epoll_ctl");
    for (;;) {
        int ready = epoll_wait(poller, events, 256, -1);
        for (int number = 0; number < ready; number++) {
            struct connection *peer = events[number].data.ptr;
            if (!peer) {
                accept_one(poller, listener);
            } else if (read_requests(peer)) {
                close(peer->fd);
                free(peer->buffer);
                free(peer);
            }
        }
    }
}
