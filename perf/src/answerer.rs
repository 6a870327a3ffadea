//! A stand-in server: takes any request with a Content-Length and answers what it was told to.
//!
//! Measures what `client` can do on this machine (`ceiling`), and is its counterpart in tests.
//! Lives on a thread of its own, pinned where asked; allocates per connection.
//!
//! Invariant: one answer per request, written at once; an empty answer ends the connection instead.
//! Not here: anything of HTTP beyond that; it must stay cheaper than any real server.

use crate::cpu;
use anyhow::{Context, Result};
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};
use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

/// What the server under test answers to one accepted record.
pub const CREATED: &[u8] =
    b"HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 14\r\n\r\n{\"accepted\":1}";

const LISTENER: Token = Token(usize::MAX);
const WAKER: Token = Token(usize::MAX - 1);
const READ_SIZE: usize = 256 << 10;

/// What it saw until it was stopped.
#[derive(Default)]
pub struct Seen {
    pub connections: u64,
    pub requests: u64,
    pub body_bytes: u64,
}

pub struct Answerer {
    address: SocketAddr,
    waker: Waker,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Seen>>,
}

impl Answerer {
    /// Listens on a free port; `answer` gets the number of the request, from 1.
    pub fn start(
        cpu: Option<usize>,
        answer: impl FnMut(u64) -> Vec<u8> + Send + 'static,
    ) -> Result<Self> {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut listener = TcpListener::bind(loopback).context("bind")?;
        let address = listener.local_addr().context("local address")?;
        let poll = Poll::new().context("epoll")?;
        poll.registry()
            .register(&mut listener, LISTENER, Interest::READABLE)
            .context("epoll_ctl")?;
        let waker = Waker::new(poll.registry(), WAKER).context("eventfd")?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::Builder::new()
            .name("answerer".to_owned())
            .spawn(move || {
                if let Some(cpu) = cpu {
                    // Unpinned it answers all the same.
                    let _ = cpu::pin(cpu);
                }
                serve(poll, &listener, &stopped, answer)
            })
            .context("thread")?;
        Ok(Answerer {
            address,
            waker,
            stop,
            thread: Some(thread),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Ends all connections and the thread.
    pub fn stop(mut self) -> Seen {
        self.end()
    }

    fn end(&mut self) -> Seen {
        self.stop.store(true, Ordering::Release);
        let _ = self.waker.wake();
        self.thread
            .take()
            .and_then(|thread| thread.join().ok())
            .unwrap_or_default()
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.end();
    }
}

struct Peer {
    stream: TcpStream,
    /// A head that has not ended yet.
    head: Vec<u8>,
    body_left: usize,
    in_body: bool,
}

fn serve(
    mut poll: Poll,
    listener: &TcpListener,
    stop: &AtomicBool,
    mut answer: impl FnMut(u64) -> Vec<u8>,
) -> Seen {
    let mut seen = Seen::default();
    let mut peers: HashMap<usize, Peer> = HashMap::new();
    let mut scratch = vec![0; READ_SIZE];
    let mut events = Events::with_capacity(1024);
    while !stop.load(Ordering::Acquire) {
        if poll.poll(&mut events, None).is_err() {
            continue;
        }
        for event in &events {
            match event.token() {
                WAKER => {}
                LISTENER => {
                    while let Ok((mut stream, _)) = listener.accept() {
                        let token = seen.connections as usize;
                        seen.connections += 1;
                        let _ = stream.set_nodelay(true);
                        if poll
                            .registry()
                            .register(&mut stream, Token(token), Interest::READABLE)
                            .is_ok()
                        {
                            let peer = Peer {
                                stream,
                                head: Vec::new(),
                                body_left: 0,
                                in_body: false,
                            };
                            peers.insert(token, peer);
                        }
                    }
                }
                Token(token) => {
                    if let Some(peer) = peers.get_mut(&token)
                        && !peer.turn(&mut scratch, &mut seen, &mut answer)
                    {
                        peers.remove(&token);
                    }
                }
            }
        }
    }
    seen
}

impl Peer {
    /// Reads what there is and answers what is complete. False once the connection is over.
    fn turn(
        &mut self,
        scratch: &mut [u8],
        seen: &mut Seen,
        answer: &mut impl FnMut(u64) -> Vec<u8>,
    ) -> bool {
        loop {
            let count = match self.stream.read(scratch) {
                Ok(0) => return false,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) => return false,
            };
            let mut rest = &scratch[..count];
            while !rest.is_empty() {
                if !self.in_body {
                    let before = self.head.len();
                    self.head.extend_from_slice(rest);
                    let Some((head_size, body_size)) = parse(&self.head) else {
                        break;
                    };
                    self.head.clear();
                    rest = &rest[head_size - before..];
                    self.body_left = body_size;
                    self.in_body = true;
                    seen.body_bytes += body_size as u64;
                }
                let taken = self.body_left.min(rest.len());
                self.body_left -= taken;
                rest = &rest[taken..];
                if self.body_left == 0 {
                    self.in_body = false;
                    seen.requests += 1;
                    let bytes = answer(seen.requests);
                    // An answer fits any socket buffer, so a short write is an end like any other.
                    if bytes.is_empty() || self.stream.write_all(&bytes).is_err() {
                        return false;
                    }
                }
            }
        }
    }
}

/// Sizes of the head and the body behind it, once the head has ended.
fn parse(head: &[u8]) -> Option<(usize, usize)> {
    let mut headers = [httparse::EMPTY_HEADER; 16];
    let mut request = httparse::Request::new(&mut headers);
    let httparse::Status::Complete(size) = request.parse(head).ok()? else {
        return None;
    };
    let body_size = request
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok())
        .unwrap_or(0);
    Some((size, body_size))
}
