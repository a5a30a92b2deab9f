// The guard's inner loop: characters' classes in, what ended and where matches may still begin out. The class after all
// others is the end of the text: nothing begins there, and what still runs is closed.
//
// A Table is an automaton's deterministic states as flat arrays; its owner adds states while texts need them. A state
// blob is one text's threads (a state, where it began), runs (threads that outgrew the limit) and events, in one array
// of int64 that its owner keeps, copies and grows. A walk goes on until a transition is not known yet, an event asks
// for an answer, or there is no room; it never allocates and knows nothing of rules. The meaning of every step is that
// of Matcher in src/gnomon/guard/matcher.py, with which tests compare it.

#include <cstdint>
#include <cstring>

namespace {

enum Header { POSITION, CONTEXT, LAST_CLASS, THREADS, RUNS, EVENTS, THREAD_ROOM, RUN_ROOM, EVENT_ROOM, FRONTIER, OLDEST, REASON, HEADER = 16 };
enum Reason { AT_END, UNKNOWN, ATTENTION, FULL };
enum Kind { NOTE, ABSORB, CLOSE, ASK };
enum Flag : uint8_t { GATE = 1, URGENT = 2 };
constexpr int64_t NEVER = -1, BEFORE = -2;  // a thread's last note: none; in events already read

struct Thread { int64_t state, start, note; };
struct Run { int64_t state, start, end, rule; };
struct Event { int64_t kind, start, number, place; };

struct Table {
    int64_t classes;
    const int32_t* next;         // [states, classes + 1] 0: not known; else (state + 2) << 1 | whether rules end before this class
    const int32_t* accepts;      // [states, classes + 1] which set of rules ends
    const int32_t* first;        // [sets, classes + 1] the state of a thread that begins after this class: 0, or state + 2
    const uint8_t* flags;        // [states]
    const uint8_t* urgent_sets;  // [sets]
    int64_t* marks;              // [states] scratch: the last tick at which a thread was in this state
    int64_t tick;
};

inline int64_t state_of(int32_t entry) { return (entry >> 1) - 2; }

}  // namespace

extern "C" {

// Advances over classes[place..count), returns how far it came; blob[REASON] says why it stopped there.
int64_t gnomon_matcher_walk(Table* table, const uint8_t* classes, int64_t place, int64_t count, int64_t* blob, int64_t max_hold) {
    const int64_t end = table->classes, width = end + 1;
    const int32_t* next = table->next;
    int64_t* marks = table->marks;
    Thread* threads = reinterpret_cast<Thread*>(blob + HEADER);
    Run* runs = reinterpret_cast<Run*>(threads + blob[THREAD_ROOM]);
    Event* events = reinterpret_cast<Event*>(runs + blob[RUN_ROOM]);
    int64_t live = blob[THREADS], running = blob[RUNS], written = blob[EVENTS], barrier = written;
    int64_t position = blob[POSITION], context = blob[CONTEXT], before = blob[LAST_CLASS];
    int64_t tick = ++table->tick;
    for (int64_t i = 0; i < live; ++i) {
        marks[threads[i].state] = tick;
        if (threads[i].note != NEVER) threads[i].note = BEFORE;
    }
    Reason reason = AT_END;
    while (place < count) {
        const int64_t c = classes[place];
        int64_t begun = 0, following = -1;
        if (context >= 0 && c != end) {
            const int32_t entry = next[context * width + c];
            if (!entry) { reason = UNKNOWN; break; }
            if (entry & 1) begun = table->accepts[context * width + c];
            following = state_of(entry);
        }
        const int64_t first = c == end ? NEVER : int64_t(table->first[begun * width + before + 1]) - 2;
        if (first == -2) { reason = UNKNOWN; break; }
        bool known = true, begins = false;
        if (first >= 0) {
            const int32_t entry = next[first * width + c];
            known = entry != 0;
            begins = entry != (1 << 1) && marks[first] != tick;  // a thread that ends here without a match says nothing
        }
        for (int64_t i = 0; i < live && known; ++i) known = next[threads[i].state * width + c] != 0;
        for (int64_t i = 0; i < running && known && c != end; ++i) known = next[runs[i].state * width + c] != 0;
        if (!known) { reason = UNKNOWN; break; }
        if (live + 1 > blob[THREAD_ROOM] || written + 3 * (live + 1) + running > blob[EVENT_ROOM]) { reason = FULL; break; }

        if (begins) threads[live++] = {first, position, NEVER};
        tick = ++table->tick;
        bool attention = false;
        int64_t kept = 0;
        for (int64_t i = 0; i < live; ++i) {
            Thread thread = threads[i];
            const int64_t at = thread.state * width + c;
            const int32_t entry = next[at];
            if (entry & 1) {
                const int32_t set = table->accepts[at];
                if (thread.note >= barrier && events[thread.note].number == set) {
                    events[thread.note].place = position;
                } else {
                    thread.note = written;
                    events[written++] = {NOTE, thread.start, set, position};
                }
                attention |= table->urgent_sets[set] != 0;
            }
            const int64_t state = state_of(entry);
            if (state < 0) continue;
            if (marks[state] == tick) {
                if (thread.note != NEVER) {
                    int64_t owner = 0;
                    while (threads[owner].state != state) ++owner;
                    events[written++] = {ABSORB, threads[owner].start, thread.start, position};
                    barrier = written;
                }
                continue;
            }
            marks[state] = tick;
            thread.state = state;
            threads[kept++] = thread;
            if (table->flags[state] & URGENT) {
                events[written++] = {ASK, thread.start, state, position + 1};
                attention = true;
            }
        }
        live = kept;
        if (c != end) ++position;
        int64_t going = 0;
        for (int64_t i = 0; i < running; ++i) {
            Run run = runs[i];
            const int64_t state = c == end ? NEVER : state_of(next[run.state * width + c]);
            if (state < 0) {
                events[written++] = {CLOSE, run.start, run.rule, run.end};
                continue;
            }
            run.state = state;
            run.end = position;
            runs[going++] = run;
            if (marks[state] == tick) {  // a thread in a run's state is the run's own text
                marks[state] = 0;
                int64_t gone = 0;
                while (threads[gone].state != state) ++gone;
                std::memmove(threads + gone, threads + gone + 1, (--live - gone) * sizeof(Thread));
            }
        }
        running = going;
        ++place;
        if (c == end) break;
        context = following;
        before = c;
        if (attention || (live && position - threads[0].start >= max_hold)) { reason = ATTENTION; break; }
    }
    int64_t frontier = position;
    for (int64_t i = 0; i < live; ++i) {
        if (table->flags[threads[i].state] & GATE) { frontier = threads[i].start; break; }
    }
    blob[POSITION] = position;
    blob[CONTEXT] = context;
    blob[LAST_CLASS] = before;
    blob[THREADS] = live;
    blob[RUNS] = running;
    blob[EVENTS] = written;
    blob[FRONTIER] = frontier;
    blob[OLDEST] = live ? threads[0].start : position;
    blob[REASON] = reason;
    return place;
}

}  // extern "C"
