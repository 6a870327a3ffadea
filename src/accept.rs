//! Accepting: one listening socket per core and address, and a place for every connection.
//!
//! Before it: [`crate::node`] bound the sockets.
//! After it: a task per connection runs [`crate::connection::serve`].
//! Thread: one reactor. Allocates: per connection (the peer's address, the descriptor, the task); never per request.
//! Invariant: at most `limits.connections` connections are open; beyond that the backlog of the kernel waits.
//! Not here: limits per peer.

use std::cell::{Cell, RefCell};
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio_uring::net::TcpStream;

use crate::connection;
use crate::error::Fatal;
use crate::limits::LISTEN_BACKLOG;
use crate::metrics::Count;
use crate::reactor::Core;
use crate::wait::WaitQueue;

/// How long a listener rests after it failed to accept (no file descriptor left, usually).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long a start waits for an address that is in use. A weir that was killed is gone before the kernel has ended its
/// ring, and with it the listeners that were accepting.
const BIND_PATIENCE: Duration = Duration::from_secs(2);
const BIND_PAUSE: Duration = Duration::from_millis(50);

/// Binds `core_count` sockets to one address; the kernel spreads connections over them (`SO_REUSEPORT`).
///
/// Port 0 picks a free port, the same for all of them.
pub fn bind(address: SocketAddr, core_count: usize) -> Result<Vec<TcpListener>, Fatal> {
    let deadline = Instant::now() + BIND_PATIENCE;
    loop {
        match try_bind(address, core_count) {
            Err(Fatal::PortTaken { .. }) if Instant::now() < deadline => {
                std::thread::sleep(BIND_PAUSE);
            }
            outcome => return outcome,
        }
    }
}

fn try_bind(address: SocketAddr, core_count: usize) -> Result<Vec<TcpListener>, Fatal> {
    let fault = |source| Fatal::binding(address, source);
    // SO_REUSEPORT would let a second weir share the port in silence, so the port is first claimed without it.
    let claim = socket(address).map_err(fault)?;
    claim.bind(&address.into()).map_err(fault)?;
    let address = claim
        .local_addr()
        .ok()
        .and_then(|bound| bound.as_socket())
        .unwrap_or(address);
    drop(claim);
    (0..core_count)
        .map(|_| {
            let socket = socket(address)?;
            socket.set_reuse_port(true)?;
            socket.bind(&address.into())?;
            socket.listen(LISTEN_BACKLOG)?;
            Ok(socket.into())
        })
        .collect::<io::Result<_>>()
        .map_err(fault)
}

fn socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    // Accepted sockets inherit it: replies are small and complete, and must not wait for an acknowledgement.
    socket.set_tcp_nodelay(true)?;
    Ok(socket)
}

/// The connections of one core.
pub struct Connections {
    open: RefCell<Vec<Option<Open>>>,
    /// Places nobody has; an accept loop holds one while it waits for its next connection.
    free: RefCell<Vec<usize>>,
    open_count: Cell<usize>,
    queue: WaitQueue,
    /// Woken whenever a connection ends; the drain waits here.
    ended: WaitQueue,
}

struct Open {
    stream: Rc<TcpStream>,
    idle: bool,
}

/// One connection's place among the open ones, until it is dropped.
pub struct Place {
    core: Rc<Core>,
    index: usize,
}

impl Connections {
    /// Places for `connections_max` connections, taken by the accept loops of `listener_count` listeners.
    pub fn new(connections_max: usize, listener_count: usize) -> Self {
        Connections {
            open: RefCell::new((0..connections_max).map(|_| None).collect()),
            free: RefCell::new((0..connections_max).rev().collect()),
            open_count: Cell::new(0),
            queue: WaitQueue::new(listener_count),
            ended: WaitQueue::new(1),
        }
    }

    pub fn open_count(&self) -> usize {
        self.open_count.get()
    }

    /// Completes when every connection has ended; `false` where `deadline` passes first.
    pub async fn all_ended(&self, deadline: Instant) -> bool {
        let ended = || (self.open_count() == 0).then_some(());
        self.ended.until(Some(deadline), ended).await.is_some()
    }

    /// Ends the reading side of every idle connection: its task wakes, serves what had already come, and ends.
    pub fn wake_idle(&self) {
        for open in self.open.borrow().iter().flatten().filter(|open| open.idle) {
            let _ = open.stream.shutdown(Shutdown::Read);
        }
    }

    /// Cuts every connection.
    pub fn cut_all(&self) {
        for open in self.open.borrow().iter().flatten() {
            let _ = open.stream.shutdown(Shutdown::Both);
        }
    }
}

impl Place {
    /// Says whether the connection waits between two requests.
    pub fn set_idle(&self, idle: bool) {
        let mut connections = self.core.connections.open.borrow_mut();
        if let Some(open) = &mut connections[self.index] {
            open.idle = idle;
            if idle && self.core.draining() {
                let _ = open.stream.shutdown(Shutdown::Read);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let connections = &self.core.connections;
        connections.open.borrow_mut()[self.index] = None;
        connections.open_count.set(connections.open_count.get() - 1);
        connections.free.borrow_mut().push(self.index);
        connections.queue.wake_one();
        let open_count = connections.open_count() as u64;
        self.core
            .metrics
            .update(|update| update.set(Count::ConnectionsOpen, open_count));
        connections.ended.wake_one();
    }
}

/// Accepts connections of one listener until the core drains.
pub async fn accept(core: Rc<Core>, listener: tokio_uring::net::TcpListener) {
    loop {
        let connections = &core.connections;
        let index = connections
            .queue
            .until(None, || connections.free.borrow_mut().pop())
            .await;
        let Some(index) = index else {
            unreachable!("there is a waiter's place for every listener");
        };
        let accepted = listener.accept().await;
        if core.draining() {
            return;
        }
        match accepted {
            Ok((stream, _peer)) => {
                let stream = Rc::new(stream);
                connections.open.borrow_mut()[index] = Some(Open {
                    stream: stream.clone(),
                    idle: false,
                });
                connections.open_count.set(connections.open_count.get() + 1);
                let place = Place {
                    core: core.clone(),
                    index,
                };
                let open_count = connections.open_count() as u64;
                core.metrics.update(|update| {
                    update.add(Count::Connections, 1);
                    update.set(Count::ConnectionsOpen, open_count);
                });
                tokio_uring::spawn(connection::serve(core.clone(), stream, place));
            }
            Err(error) => {
                connections.free.borrow_mut().push(index);
                core.metrics
                    .update(|update| update.add(Count::AcceptErrors, 1));
                tracing::warn!(%error, "a connection could not be accepted; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}
