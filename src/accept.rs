//! Accepting: one listening socket per core and address, and a place for every connection.
//!
//! Before it: [`crate::node`] bound the sockets.
//! After it: a task per connection runs [`crate::connection::serve`].
//! Thread: one reactor. Allocates: per connection (the peer's address, the descriptor, the task); never per request.
//! Invariant: at most `limits.connections` connections are open; beyond that the backlog of the kernel waits.
//! Not here: how long a peer may take ([`crate::deadline`]).

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, Ipv6Addr, Shutdown, SocketAddr, TcpListener};
use std::rc::Rc;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};
use tokio_uring::net::TcpStream;

use crate::config::Config;
use crate::connection;
use crate::deadline::{Cut, Deadlines, Pace};
use crate::error::{Fatal, Reject};
use crate::http::reply::{Persistence, Replies};
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
    pub deadlines: Deadlines,
    /// How many connections each network has; one without any is not there.
    networks: RefCell<HashMap<IpAddr, usize>>,
    per_network_max: Cell<usize>,
}

struct Open {
    stream: Rc<TcpStream>,
    idle: bool,
    expired: bool,
}

/// One connection's place among the open ones, until it is dropped.
pub struct Place {
    core: Rc<Core>,
    index: usize,
    /// Where the connection is counted; a proxy's is not, until it says whose it is.
    network: Option<IpAddr>,
    /// In the order of the configuration.
    pub listener_index: usize,
    pub peer: IpAddr,
}

impl Connections {
    /// Places for `limits.connections` connections, taken by the accept loops of all listeners.
    pub fn new(config: &Config) -> Self {
        let connections_max = config.limits.connections;
        Connections {
            open: RefCell::new((0..connections_max).map(|_| None).collect()),
            free: RefCell::new((0..connections_max).rev().collect()),
            open_count: Cell::new(0),
            queue: WaitQueue::new(config.listeners.len()),
            ended: WaitQueue::new(1),
            deadlines: Deadlines::new(&config.deadlines, connections_max),
            networks: RefCell::new(HashMap::with_capacity(connections_max)),
            per_network_max: Cell::new(config.limits.connections_per_address),
        }
    }

    /// Goes by another configuration from now on; connections that are open stay.
    pub fn reload(&self, config: &Config) {
        self.deadlines.allow(&config.deadlines);
        self.per_network_max
            .set(config.limits.connections_per_address);
    }

    /// Gives back a place that no connection came to have.
    fn free_unused(&self, index: usize) {
        self.free.borrow_mut().push(index);
        // Another listener may wait for it.
        self.queue.wake_one();
    }

    /// Counts one more connection of a network, unless that is one too many.
    fn enter(&self, network: IpAddr) -> bool {
        let mut networks = self.networks.borrow_mut();
        let count = networks.entry(network).or_insert(0);
        let has_room = *count < self.per_network_max.get();
        *count += usize::from(has_room);
        has_room
    }

    fn leave(&self, network: IpAddr) {
        let mut networks = self.networks.borrow_mut();
        let count = networks.get_mut(&network).expect("it was counted");
        *count -= 1;
        if *count == 0 {
            networks.remove(&network);
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

/// Who counts as one: an address; of IPv6 the network of 64 bits that a single host may have (RFC 4291 §2.5.4).
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => {
            let prefix = u128::from(address) & (u128::MAX << 64);
            Ipv6Addr::from(prefix).into()
        }
        address => address,
    }
}

impl Place {
    /// Sets the connection's deadline.
    pub fn set_deadline(&self, pace: &Pace, cut: Cut) {
        self.core.connections.deadlines.set(self.index, pace, cut);
    }

    /// Sets the deadline of a connection that keeps a slab of this class while it waits to read.
    pub fn set_deadline_keeping(&self, pace: &Pace, class_index: usize) {
        let deadlines = &self.core.connections.deadlines;
        deadlines.set_keeping(self.index, pace, class_index);
    }

    pub fn clear_deadline(&self) {
        self.core.connections.deadlines.clear(self.index);
    }

    /// Whether the connection begins with a PROXY header, and has not shown it yet.
    pub fn is_of_proxy(&self) -> bool {
        // As it was found when it was accepted: a reload may have changed `listener.proxies` since.
        self.network.is_none()
    }

    /// Takes the address that a proxy names for the peer's; an error where that has too many connections.
    pub fn set_source(&mut self, source: IpAddr) -> Result<(), Reject> {
        assert!(self.network.is_none(), "a connection has one source");
        let connections = &self.core.connections;
        let source = source.to_canonical();
        if !connections.enter(network(source)) {
            self.core
                .metrics
                .update(|update| update.add(Count::ConnectionsRefused, 1));
            return Err(Reject::ConnectionCount);
        }
        self.network = Some(network(source));
        self.peer = source;
        Ok(())
    }

    /// Whether a deadline has passed: no more can be read than what had come by then.
    pub fn expired(&self) -> bool {
        let open = self.core.connections.open.borrow();
        open[self.index].as_ref().is_some_and(|open| open.expired)
    }

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
        connections.deadlines.clear(self.index);
        if let Some(network) = self.network {
            connections.leave(network);
        }
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
pub async fn accept(
    core: Rc<Core>,
    listener: tokio_uring::net::TcpListener,
    listener_index: usize,
) {
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
            Ok((stream, peer)) => {
                let peer = peer.ip().to_canonical();
                let network = (!is_proxy(&core, listener_index, peer)).then(|| network(peer));
                if network.is_some_and(|network| !connections.enter(network)) {
                    connections.free_unused(index);
                    core.metrics
                        .update(|update| update.add(Count::ConnectionsRefused, 1));
                    turn_away(&core, stream).await;
                    continue;
                }
                let stream = Rc::new(stream);
                connections.open.borrow_mut()[index] = Some(Open {
                    stream: stream.clone(),
                    idle: false,
                    expired: false,
                });
                connections.open_count.set(connections.open_count.get() + 1);
                let place = Place {
                    core: core.clone(),
                    index,
                    network,
                    listener_index,
                    peer,
                };
                let open_count = connections.open_count() as u64;
                core.metrics.update(|update| {
                    update.add(Count::Connections, 1);
                    update.set(Count::ConnectionsOpen, open_count);
                });
                tokio_uring::spawn(connection::serve(core.clone(), stream, place));
            }
            Err(error) => {
                connections.free_unused(index);
                core.metrics
                    .update(|update| update.add(Count::AcceptErrors, 1));
                tracing::warn!(%error, "a connection could not be accepted; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_proxy(core: &Core, listener_index: usize, peer: IpAddr) -> bool {
    let live = core.live();
    let proxies = &live.config.listeners[listener_index].proxies;
    proxies.iter().any(|network| network.contains(&peer))
}

/// Says why, to who has too many connections already. The socket is new, so its buffer takes that at once.
async fn turn_away(core: &Core, stream: TcpStream) {
    let mut replies = Replies::new();
    let date = core.clock.date();
    replies.rejected(&Reject::ConnectionCount, &date, Persistence::Close);
    let _ = stream.write_all(replies.take()).await;
    let _ = stream.shutdown(Shutdown::Write);
}

/// Cuts the connections whose deadline has passed, for as long as the core lives.
pub async fn sweep_deadlines(core: Rc<Core>) {
    let connections = &core.connections;
    loop {
        tokio::time::sleep(connections.deadlines.period()).await;
        connections
            .deadlines
            .sweep(core.slabs.waiting(), |index, cut| {
                if let Some(open) = &mut connections.open.borrow_mut()[index] {
                    open.expired = true;
                    let _ = open.stream.shutdown(match cut {
                        Cut::Reading => Shutdown::Read,
                        Cut::Both => Shutdown::Both,
                    });
                    core.metrics
                        .update(|update| update.add(Count::DeadlinesPassed, 1));
                }
            });
    }
}
