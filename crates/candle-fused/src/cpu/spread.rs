//! Tasks over threads.
//!
//! To wake a thread takes 10 to 30 µs, as long as many an operation. So the calling thread begins at once, rayon's others
//! help as they come, and whoever comes when there is nothing left to do is not waited for. Who has helped looks for more to do
//! for a while ([`Lobby`]): steps of small models take 4 to 10% less time for it.

use std::any::{Any, TypeId};
use std::cell::RefCell;
use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

thread_local! {
    /// What a thread's tasks have left, of each type.
    static LEFT: RefCell<HashMap<TypeId, Box<dyn Any>>> = RefCell::default();
}

/// Bytes of what a thread keeps of one type, at most.
const KEPT: usize = 8 << 20;

/// What tasks leave on their thread for the next ones.
pub(crate) trait Kept: Default + 'static {
    /// Bytes that it has asked for.
    fn bytes(&self) -> usize;
}

impl Kept for () {
    fn bytes(&self) -> usize {
        0
    }
}

impl<T: 'static> Kept for Vec<T> {
    fn bytes(&self) -> usize {
        self.capacity() * size_of::<T>()
    }
}

impl<A: Kept, B: Kept> Kept for (A, B) {
    fn bytes(&self) -> usize {
        self.0.bytes() + self.1.bytes()
    }
}

/// Runs the tasks on this thread and, if that is worth it, on rayon's others. Each thread has its own `S`, and keeps it for
/// the next tasks with such a one, unless it is large: memory that has been asked for is not asked for again.
///
/// # Panics
/// If `run` does.
pub(crate) fn spread<T: Send, S: Kept>(tasks: Vec<T>, worth: bool, run: impl Fn(&mut S, T) + Sync) {
    let threads = if worth { rayon::current_num_threads().min(tasks.len()) } else { 1 };
    let queue = Mutex::new(tasks.into_iter());
    let work = || {
        // None in a thread that is ending.
        let left = LEFT.try_with(|left| left.borrow_mut().remove(&TypeId::of::<S>())).unwrap_or_default();
        let mut state: Box<S> = left.and_then(|left| left.downcast().ok()).unwrap_or_default();
        loop {
            let task = queue.lock().unwrap_or_else(PoisonError::into_inner).next();
            match task {
                Some(task) => run(&mut state, task),
                None => break,
            }
        }
        if state.bytes() <= KEPT {
            _ = LEFT.try_with(|left| left.borrow_mut().insert(TypeId::of::<S>(), state));
        }
    };
    if threads > 1 { with_help(threads - 1, &work) } else { work() }
}

/// Calls `work` here and on up to `helpers` threads of rayon's. When it returns, no call is under way or can begin.
fn with_help<W: Fn() + Sync>(helpers: usize, work: &W) {
    let door = Arc::new(Door::of(work));
    for _ in 0..helpers {
        LOBBY.call(&door);
    }
    // Closes it whether `work` returns or panics.
    let closing = Closing(&door);
    work();
    drop(closing);
    let panic = door.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(panic) = panic {
        resume_unwind(panic);
    }
}

/// Helpers that look for the next door, before they sleep.
static LOBBY: Lobby = Lobby::new(Duration::from_micros(50));

/// Where helpers stay for a while: to wake one that sleeps takes longer than many an operation, and most are followed by the next
/// one soon.
struct Lobby {
    /// How long they look.
    stay: Duration,
    /// Helpers that nobody has called yet.
    free: AtomicUsize,
    /// For each that was called where to go.
    doors: Mutex<Vec<Arc<Door>>>,
    /// How many doors there are, for who looks without a lock.
    count: AtomicUsize,
}

impl Lobby {
    const fn new(stay: Duration) -> Self {
        Self { stay, free: AtomicUsize::new(0), doors: Mutex::new(Vec::new()), count: AtomicUsize::new(0) }
    }

    /// Has somebody come to the door: who is here, else who sleeps.
    fn call(&'static self, door: &Arc<Door>) {
        let door = Arc::clone(door);
        if self.take() {
            let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
            doors.push(door);
            self.count.store(doors.len(), Ordering::Release);
        } else {
            rayon::spawn(move || {
                door.help();
                self.stay();
            });
        }
    }

    /// One less who is free, if anybody is.
    fn take(&self) -> bool {
        let less = |free: usize| free.checked_sub(1);
        self.free.fetch_update(Ordering::AcqRel, Ordering::Relaxed, less).is_ok()
    }

    /// Helps wherever somebody calls, until for a while nobody has.
    fn stay(&self) {
        self.free.fetch_add(1, Ordering::AcqRel);
        let mut since = Instant::now();
        loop {
            if self.count.load(Ordering::Acquire) > 0 {
                let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
                let door = doors.pop();
                self.count.store(doors.len(), Ordering::Release);
                drop(doors);
                if let Some(door) = door {
                    door.help();
                    self.free.fetch_add(1, Ordering::AcqRel);
                    since = Instant::now();
                }
            }
            // Who has been called meanwhile, and finds no free place to give up, goes on until there is the door.
            if since.elapsed() >= self.stay && self.take() {
                return;
            }
            std::hint::spin_loop();
        }
    }
}

/// Set when nobody may come in any more; the other bits count those inside.
const CLOSED: usize = 1 << (usize::BITS - 1);
/// How often the calling thread looks whether the last one has left before it sleeps: some microseconds.
const LOOKS: usize = 2000;

/// Where helpers come in.
struct Door {
    inside: AtomicUsize,
    /// Alive as long as the door is open or somebody is inside: see [`Closing`].
    work: *const (),
    /// Calls it.
    call: unsafe fn(*const ()),
    caller: Thread,
    /// Of the first helper that had one.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `work` is shared between threads as a reference to what is `Sync` (`Door::of`); all else is `Send` and `Sync`.
unsafe impl Send for Door {}
// SAFETY: as above.
unsafe impl Sync for Door {}

impl Door {
    fn of<W: Fn() + Sync>(work: &W) -> Self {
        /// # Safety
        /// At the address is a `W`.
        unsafe fn call<W: Fn()>(work: *const ()) {
            // SAFETY: the caller's.
            unsafe { (*work.cast::<W>())() }
        }
        Self {
            inside: AtomicUsize::new(0),
            work: ptr::from_ref(work).cast(),
            call: call::<W>,
            caller: thread::current(),
            panic: Mutex::new(None),
        }
    }

    /// Comes in and works, unless the door is closed.
    fn help(&self) {
        let enter = |inside| (inside & CLOSED == 0).then_some(inside + 1);
        if self.inside.fetch_update(Ordering::Acquire, Ordering::Relaxed, enter).is_err() {
            return;
        }
        // SAFETY: who is inside is waited for, so that what `work` points to, of the type that `call` is for, is still borrowed.
        let work = || unsafe { (self.call)(self.work) };
        if let Err(panic) = catch_unwind(AssertUnwindSafe(work)) {
            self.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
        }
        // What was written here is seen by the caller, who reads this.
        if self.inside.fetch_sub(1, Ordering::Release) == CLOSED + 1 {
            self.caller.unpark();
        }
    }
}

/// Closes the door when dropped, and waits until nobody is inside.
struct Closing<'a>(&'a Door);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        let inside = &self.0.inside;
        inside.fetch_or(CLOSED, Ordering::Relaxed);
        let mut looks = 0;
        while inside.load(Ordering::Acquire) != CLOSED {
            looks += 1;
            if looks < LOOKS { std::hint::spin_loop() } else { thread::park() }
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn every_task_runs_once_whoever_helps() {
        for count in [0, 1, 2, 3, 100] {
            for worth in [false, true] {
                let mut done = vec![0; count];
                spread(done.iter_mut().enumerate().collect(), worth, |(): &mut (), (i, done)| *done += i + 1);
                assert_eq!(done, (1..=count).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn a_thread_keeps_what_its_tasks_have_left() {
        for round in 1..4 {
            spread(vec![()], false, |left: &mut Vec<u128>, ()| {
                left.push(0);
                assert_eq!(left.len(), round);
                // Others of the same kind begin anew while these are under way.
                spread(vec![()], false, |other: &mut Vec<u128>, ()| assert!(other.is_empty()));
                if round == 3 {
                    left.reserve(KEPT);
                }
            });
        }
        // What is large is not kept.
        spread(vec![()], false, |left: &mut Vec<u128>, ()| assert!(left.is_empty()));
    }

    #[test]
    fn a_helper_at_work_is_waited_for() {
        let (begun, ended) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let caller = thread::current().id();
        with_help(1, &|| {
            if thread::current().id() == caller {
                while begun.load(Ordering::SeqCst) == 0 {
                    thread::yield_now();
                }
            } else {
                begun.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(50));
                ended.fetch_add(1, Ordering::SeqCst);
            }
        });
        assert_eq!(ended.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_helper_that_comes_late_finds_the_door_closed() {
        let calls = AtomicUsize::new(0);
        let work = || {
            calls.fetch_add(1, Ordering::SeqCst);
        };
        let door = Door::of(&work);
        door.help();
        drop(Closing(&door));
        door.help();
        assert_eq!(calls.load(Ordering::SeqCst), 1);
    }

    /// A helper in a lobby of its own.
    fn stays(stay: Duration) -> (&'static Lobby, thread::JoinHandle<()>) {
        let lobby: &'static Lobby = Box::leak(Box::new(Lobby::new(stay)));
        (lobby, thread::spawn(|| lobby.stay()))
    }

    #[test]
    fn who_is_in_the_lobby_is_called_before_who_sleeps() {
        let (lobby, helper) = stays(Duration::from_secs(2));
        for _ in 0..100 {
            let called = Mutex::new(None);
            let work = || *called.lock().unwrap() = Some(thread::current().id());
            let door = Arc::new(Door::of(&work));
            let closing = Closing(&door);
            while lobby.free.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            lobby.call(&door);
            while called.lock().unwrap().is_none() {
                thread::yield_now();
            }
            drop(closing);
            assert_eq!(*called.lock().unwrap(), Some(helper.thread().id()));
        }
    }

    #[test]
    fn nobody_stays_who_is_not_called() {
        let (lobby, helper) = stays(Duration::ZERO);
        helper.join().unwrap();
        assert_eq!(lobby.free.load(Ordering::SeqCst), 0);
        // Who sleeps is called then, and comes by the other way.
        let calls = AtomicUsize::new(0);
        let work = || {
            calls.fetch_add(1, Ordering::SeqCst);
        };
        let door = Arc::new(Door::of(&work));
        let closing = Closing(&door);
        lobby.call(&door);
        while calls.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        drop(closing);
    }

    #[test]
    fn a_panic_anywhere_is_the_callers() {
        let caller = thread::current().id();
        for helper_panics in [false, true] {
            let begun = AtomicUsize::new(0);
            let work = || {
                begun.fetch_add(1, Ordering::SeqCst);
                while begun.load(Ordering::SeqCst) < 2 {
                    thread::yield_now();
                }
                assert!((thread::current().id() == caller) == helper_panics, "planned");
            };
            assert!(catch_unwind(AssertUnwindSafe(|| with_help(1, &work))).is_err());
        }
    }
}
