//! A loopback socket that can go away and come back under the same port, and connections that can be reset.
//!
//! Before it: an address. After it: an axum router, with the connection's [`Wire`] among the request's extensions.
//! Thread: the runtime's; opening and closing are for any. Allocates: per connection.
//! Invariant: closed means that a new connection is refused and every old one has ended; the port stays taken.
//! Not here: what is answered.

use std::collections::HashMap;
use std::io;
use std::net::{Shutdown, SocketAddr, TcpListener};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::JoinSet;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;

/// A port, and what answers on it.
pub(super) struct Listener {
    /// Bound for as long as this lives. `shutdown` ends its listening, and `listen` begins it anew.
    socket: Socket,
    address: SocketAddr,
    router: Router,
    runtime: Handle,
    connections: Arc<Connections>,
    accepting: Mutex<Option<tokio::task::AbortHandle>>,
}

#[derive(Default)]
struct Connections {
    open: Mutex<HashMap<u64, Arc<Wire>>>,
    next: AtomicU64,
}

/// A connection, as far as a fault needs it.
pub(super) struct Wire {
    socket: Mutex<Option<Socket>>,
    reset: Notify,
}

impl Wire {
    /// Ends the connection with RST in place of anything that was still to be sent.
    pub fn reset(&self) {
        if let Some(socket) = self.socket.lock().unwrap().take() {
            // Where the option is refused the connection still ends, with FIN.
            let _ = socket.set_linger(Some(Duration::ZERO));
        }
        self.reset.notify_one();
    }

    fn close(&self) {
        if let Some(socket) = &*self.socket.lock().unwrap() {
            // An error means that the peer was faster.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn reusable() -> io::Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// A socket bound to `address`, with port 0 already resolved.
///
/// Linux gives a port that it chose itself back when listening ends, and keeps one that was asked for.
/// So a chosen port is asked for again, while the first socket still holds it.
pub(super) fn bind(address: SocketAddr) -> io::Result<(Socket, SocketAddr)> {
    let first = reusable()?;
    first.bind(&address.into())?;
    let bound = first
        .local_addr()?
        .as_socket()
        .ok_or_else(|| io::Error::other("not an IP socket"))?;
    if address.port() != 0 {
        return Ok((first, bound));
    }
    let second = reusable()?;
    second.bind(&bound.into())?;
    Ok((second, bound))
}

impl Listener {
    /// Not listening yet.
    pub fn new(socket: Socket, address: SocketAddr, router: Router, runtime: Handle) -> Listener {
        Listener {
            socket,
            address,
            router,
            runtime,
            connections: Arc::default(),
            accepting: Mutex::new(None),
        }
    }

    /// Begins to accept; does nothing where it does already.
    pub fn open(&self) -> io::Result<()> {
        let mut accepting = self.accepting.lock().unwrap();
        if accepting.is_some() {
            return Ok(());
        }
        self.socket.listen(BACKLOG)?;
        let listener = TcpListener::from(self.socket.try_clone()?);
        let _entered = self.runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let accept = accept(listener, self.router.clone(), self.connections.clone());
        *accepting = Some(self.runtime.spawn(accept).abort_handle());
        Ok(())
    }

    /// Refuses new connections and ends the open ones, before it returns.
    pub fn close(&self) {
        let Some(accepting) = self.accepting.lock().unwrap().take() else {
            return;
        };
        // An error means that it was not listening.
        let _ = self.socket.shutdown(Shutdown::Both);
        accepting.abort();
        for wire in self.connections.open.lock().unwrap().values() {
            wire.close();
        }
        tracing::debug!(address = %self.address, "the stand-in stopped listening");
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.close();
    }
}

async fn accept(listener: tokio::net::TcpListener, router: Router, connections: Arc<Connections>) {
    let mut tasks = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    tasks.spawn(serve(stream, router.clone(), connections.clone()));
                }
                Err(error) => {
                    // Out of descriptors, or closed: the task is about to be aborted.
                    tracing::debug!(%error, "the stand-in could not accept");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            },
            Some(_) = tasks.join_next() => {}
        }
    }
}

async fn serve(stream: TcpStream, router: Router, connections: Arc<Connections>) {
    // Where Nagle stays on, answers are only later.
    let _ = stream.set_nodelay(true);
    let Ok(clone) = socket2::SockRef::from(&stream).try_clone() else {
        return;
    };
    let wire = Arc::new(Wire {
        socket: Mutex::new(Some(clone)),
        reset: Notify::new(),
    });
    let id = connections.next.fetch_add(1, Ordering::Relaxed);
    connections.open.lock().unwrap().insert(id, wire.clone());
    let _registered = Registered { id, connections };

    let router = router.layer(axum::Extension(wire.clone()));
    let connection = hyper::server::conn::http1::Builder::new()
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    tokio::select! {
        // An error is the client's end of the connection, which the client knows best.
        _ = connection => {}
        () = wire.reset.notified() => {}
    }
}

struct Registered {
    id: u64,
    connections: Arc<Connections>,
}

impl Drop for Registered {
    fn drop(&mut self) {
        self.connections.open.lock().unwrap().remove(&self.id);
    }
}
