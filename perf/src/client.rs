//! The load: one thread, many kept-alive connections, the next request as soon as an answer is complete.
//!
//! Takes the requests of `request` and talks to the server under test (or to `answerer`, in tests and `ceiling`).
//! Lives on the thread that calls [`Client::run`]; allocates when connections are made, nothing per request after that.
//!
//! Invariants: no request is sent twice; every request sent is counted once, as an answer by status or as a failure;
//! only loopback addresses are connected to; a run ends by count or by time.
//! Not here: pipelining (a sender that waits for its answer is what the server's users run); TLS, which `transport` does
//! for it; HTTP/2, which `client_http2` speaks.

use crate::answer::AnswerReader;
use crate::request::Request;
use crate::transport::Transport;
use anyhow::{Context, Result, ensure};
use hdrhistogram::Histogram;
use mio::{Events, Interest, Poll, Token};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use rustls::ClientConfig;
use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Events taken from the kernel at once.
const EVENTS_MAX: usize = 1024;

/// How long a run waits for answers after its last request; then they count as failures.
const GRACE: Duration = Duration::from_secs(10);

/// A run with this many failures stops: the server is gone, and what follows says nothing new.
const FAILURES_MAX: u64 = 1_000;

/// Requests at least this large get a send buffer that holds one whole, and latencies of their own.
pub const LARGE_FROM: usize = 64 << 10;

/// What stays the same from run to run.
pub struct ClientOptions {
    pub connection_count: usize,
    /// A fresh connection for every request, closed by us once its answer is complete.
    pub fresh_connections: bool,
    /// Compare each body of a 2xx answer that has one with the request's expected answer.
    pub check_answers: bool,
    /// Local addresses to connect from, in turn; empty lets the kernel choose.
    pub sources: Vec<Ipv4Addr>,
    /// With it, connections are TLS.
    pub tls: Option<Arc<ClientConfig>>,
}

/// What ends a run.
pub struct Bounds {
    pub request_count_max: u64,
    pub duration_max: Duration,
    /// Requests without an answer at any time; more than the connections means: as many as there are connections.
    pub in_flight_max: usize,
    /// Requests per second, evenly; without it the next one goes out as soon as a connection is ready.
    /// With it a latency is counted from the moment at which its request was due, also where no connection was ready:
    /// a server that stalls is not asked less. The client spins between two requests.
    pub rate: Option<f64>,
}

impl Bounds {
    /// As many requests as fit into a time.
    pub fn for_duration(duration_max: Duration) -> Self {
        Bounds {
            request_count_max: u64::MAX,
            duration_max,
            in_flight_max: usize::MAX,
            rate: None,
        }
    }

    /// When the latency of a request begins that follows so many others and is sent `now`.
    fn begun(&self, start: Instant, count: u64, now: Instant) -> Instant {
        match self.rate {
            Some(_) => self.due(start, count),
            None => now,
        }
    }

    /// When a request is due that follows so many others.
    fn due(&self, start: Instant, count: u64) -> Instant {
        match self.rate {
            Some(rate) => start + Duration::from_secs_f64(count as f64 / rate),
            None => start,
        }
    }
}

/// What a run, or several of them added up, came to.
pub struct Outcome {
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// Requests with a complete answer.
    pub answered: u64,
    pub record_count: u64,
    pub body_bytes: u64,
    pub statuses: BTreeMap<u16, u64>,
    /// 2xx answers whose body was not the expected one.
    pub answers_wrong: u64,
    /// Requests that got no complete answer.
    pub failures: u64,
    pub failure_first: Option<String>,
    /// Kept-alive connections that the server ended while no request was out.
    pub closed_idle: u64,
    /// Nanoseconds from the first byte written (with a fresh connection: from the connect) to the answer's last.
    pub latency: Histogram<u64>,
    /// The same, of those requests that have at least [`LARGE_FROM`] bytes.
    pub latency_large: Histogram<u64>,
}

impl Outcome {
    pub fn new() -> Self {
        Outcome {
            elapsed: Duration::ZERO,
            answered: 0,
            record_count: 0,
            body_bytes: 0,
            statuses: BTreeMap::new(),
            answers_wrong: 0,
            failures: 0,
            failure_first: None,
            closed_idle: 0,
            latency: histogram(),
            latency_large: histogram(),
        }
    }

    pub fn add(&mut self, other: &Outcome) {
        self.elapsed += other.elapsed;
        self.answered += other.answered;
        self.record_count += other.record_count;
        self.body_bytes += other.body_bytes;
        for (status, count) in &other.statuses {
            *self.statuses.entry(*status).or_default() += count;
        }
        self.answers_wrong += other.answers_wrong;
        self.failures += other.failures;
        if self.failure_first.is_none() {
            self.failure_first.clone_from(&other.failure_first);
        }
        self.closed_idle += other.closed_idle;
        for (latency, other) in [
            (&mut self.latency, &other.latency),
            (&mut self.latency_large, &other.latency_large),
        ] {
            latency.add(other).expect("the same bounds everywhere");
        }
    }

    /// Latencies of the requests that are not large.
    pub fn latency_small(&self) -> Histogram<u64> {
        let mut small = self.latency.clone();
        small
            .subtract(&self.latency_large)
            .expect("a part of the same");
        small
    }

    pub fn succeeded(&self) -> u64 {
        self.statuses.range(200..300).map(|(_, count)| count).sum()
    }

    /// An error unless every request was answered 2xx with the right body.
    pub fn require_success(&self) -> Result<()> {
        ensure!(
            self.failures == 0,
            "{} requests without an answer; the first: {}",
            self.failures,
            self.failure_first.as_deref().unwrap_or("unknown")
        );
        ensure!(
            self.succeeded() == self.answered,
            "not every answer was a success; answers by status: {:?}",
            self.statuses
        );
        ensure!(
            self.answers_wrong == 0,
            "{} answers did not say what was accepted",
            self.answers_wrong
        );
        ensure!(self.answered > 0, "no request was answered");
        Ok(())
    }
}

fn histogram() -> Histogram<u64> {
    // Constant arguments that the constructor accepts.
    Histogram::new_with_bounds(1_000, 60_000_000_000, 3).expect("valid bounds")
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    Idle,
    Connecting,
    /// The request is out, in part or whole; the answer is not complete.
    Awaiting,
}

struct Connection {
    stream: Option<Transport>,
    phase: Phase,
    /// Index into the requests.
    request: usize,
    sent: usize,
    started: Instant,
    reader: AnswerReader,
}

/// What became of a connection that an event was for.
enum Progress {
    Waiting,
    Answered {
        status: u16,
        is_right: bool,
        reusable: bool,
    },
    Failed(String),
    ClosedIdle,
}

pub struct Client<'a> {
    target: SocketAddr,
    options: ClientOptions,
    requests: &'a [Request],
    request_next: usize,
    source_next: usize,
    send_buffer_size: Option<usize>,
    poll: Poll,
    connections: Vec<Connection>,
    /// Connections without a request, the longest idle first.
    ready: VecDeque<usize>,
}

impl<'a> Client<'a> {
    /// Connects to nothing yet. An error if `target` is not a loopback address.
    pub fn new(
        target: SocketAddr,
        requests: &'a [Request],
        options: ClientOptions,
    ) -> Result<Self> {
        ensure!(
            target.ip().is_loopback(),
            "{target} is not a loopback address; this tool loads only its own machine"
        );
        ensure!(!requests.is_empty(), "no requests to send");
        ensure!(options.connection_count > 0, "no connections to send on");
        let largest = requests.iter().map(|request| request.bytes.len()).max();
        let connections = (0..options.connection_count)
            .map(|_| Connection {
                stream: None,
                phase: Phase::Idle,
                request: 0,
                sent: 0,
                started: Instant::now(),
                reader: AnswerReader::new(),
            })
            .collect();
        Ok(Client {
            target,
            ready: (0..options.connection_count).collect(),
            options,
            requests,
            request_next: 0,
            source_next: 0,
            send_buffer_size: largest.filter(|size| *size >= LARGE_FROM),
            poll: Poll::new().context("epoll")?,
            connections,
        })
    }

    /// From now on only these connections carry requests; the others stay as they are.
    pub fn activate(&mut self, active: Range<usize>) {
        assert!(!active.is_empty() && active.end <= self.connections.len());
        // Between two runs every connection is ready.
        self.ready = active.collect();
    }

    /// Sends until a bound is met, then waits for the answers that are out. Connections stay open for the next run.
    pub fn run(&mut self, bounds: &Bounds) -> Result<Outcome> {
        let mut outcome = Outcome::new();
        let mut events = Events::with_capacity(EVENTS_MAX);
        let in_flight_max = bounds.in_flight_max.clamp(1, self.options.connection_count);
        let mut started_count = 0u64;
        let mut in_flight = 0usize;
        let start = Instant::now();
        let deadline = start + bounds.duration_max;
        let mut now = start;
        let mut last_answer = start;
        let mut stopping = false;

        loop {
            while !stopping
                && in_flight < in_flight_max
                && started_count < bounds.request_count_max
                && bounds.due(start, started_count) <= now
            {
                // Fewer requests than connections are out, so one is ready; but it may not be an active one.
                let Some(index) = self.ready.pop_front() else {
                    break;
                };
                let due = bounds.begun(start, started_count, now);
                started_count += 1;
                match self.begin(index, due) {
                    Progress::Waiting => in_flight += 1,
                    progress => {
                        self.settle(index, progress, now, &mut outcome);
                        stopping |= outcome.failures >= FAILURES_MAX;
                    }
                }
            }
            if in_flight == 0 && (stopping || bounds.rate.is_none()) {
                break;
            }

            let patience = if stopping { deadline + GRACE } else { deadline };
            let timeout = match bounds.rate {
                // epoll waits in whole milliseconds, which would be counted as latency.
                Some(_) if !stopping => Duration::ZERO,
                _ => patience.saturating_duration_since(now),
            };
            match self.poll.poll(&mut events, Some(timeout)) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                result => result.context("epoll_wait")?,
            }
            for event in &events {
                let index = event.token().0;
                let had_request = self.connections[index].phase != Phase::Idle;
                match self.advance(index) {
                    Progress::Waiting => {}
                    progress => {
                        now = Instant::now();
                        if had_request {
                            in_flight -= 1;
                            last_answer = now;
                        }
                        self.settle(index, progress, now, &mut outcome);
                        // The successor goes out at once, not after the rest of the batch.
                        if had_request
                            && !stopping
                            && started_count < bounds.request_count_max
                            && bounds.due(start, started_count) <= now
                            && let Some(next) = self.ready.pop_front()
                        {
                            let due = bounds.begun(start, started_count, now);
                            started_count += 1;
                            match self.begin(next, due) {
                                Progress::Waiting => in_flight += 1,
                                progress => self.settle(next, progress, now, &mut outcome),
                            }
                        }
                    }
                }
            }
            now = Instant::now();
            stopping |= now >= deadline
                || started_count >= bounds.request_count_max
                || outcome.failures >= FAILURES_MAX;
            if now >= deadline + GRACE {
                for index in 0..self.connections.len() {
                    if self.connections[index].phase != Phase::Idle {
                        let silence = Progress::Failed("no answer in time".to_owned());
                        self.settle(index, silence, now, &mut outcome);
                    }
                }
                break;
            }
        }
        outcome.elapsed = last_answer.duration_since(start);
        debug_assert_eq!(outcome.answered + outcome.failures, started_count);
        Ok(outcome)
    }

    /// Notices connections that the server has ended since the last run, without waiting for anything.
    pub fn count_closed(&mut self) -> Result<u64> {
        let mut events = Events::with_capacity(EVENTS_MAX);
        let mut outcome = Outcome::new();
        // Edge-triggered: each poll that says something leaves less to say, so this ends.
        for _ in 0..=self.connections.len() {
            self.poll
                .poll(&mut events, Some(Duration::ZERO))
                .context("epoll_wait")?;
            if events.is_empty() {
                break;
            }
            for event in &events {
                let index = event.token().0;
                match self.advance(index) {
                    Progress::Waiting => {}
                    progress => self.settle(index, progress, Instant::now(), &mut outcome),
                }
            }
        }
        Ok(outcome.closed_idle)
    }

    pub fn open_count(&self) -> usize {
        self.connections
            .iter()
            .filter(|connection| connection.stream.is_some())
            .count()
    }

    /// Gives the next request to a ready connection, which is opened if it is not open.
    fn begin(&mut self, index: usize, now: Instant) -> Progress {
        let request = self.request_next;
        self.request_next = (request + 1) % self.requests.len();
        {
            let connection = &mut self.connections[index];
            assert!(
                connection.phase == Phase::Idle,
                "a connection carries one request"
            );
            connection.request = request;
            connection.sent = 0;
            connection.started = now;
            connection.reader.reset();
            if connection.stream.is_some() {
                connection.phase = Phase::Awaiting;
                return match connection.send(&self.requests[request]) {
                    Ok(()) => Progress::Waiting,
                    Err(reason) => Progress::Failed(reason),
                };
            }
        }
        match self.connect(index) {
            Ok(stream) => {
                let connection = &mut self.connections[index];
                connection.stream = Some(stream);
                connection.phase = Phase::Connecting;
                Progress::Waiting
            }
            Err(error) => Progress::Failed(format!("connect: {error:#}")),
        }
    }

    /// A nonblocking connect, registered with epoll; writability says when it is through.
    fn connect(&mut self, index: usize) -> Result<Transport> {
        let family = match self.target.ip() {
            IpAddr::V4(_) => AddressFamily::INET,
            IpAddr::V6(_) => AddressFamily::INET6,
        };
        let socket = rustix::net::socket_with(
            family,
            SocketType::STREAM,
            if self.options.tls.is_some() {
                // The handshake is done before anything else happens: it is not what is measured.
                SocketFlags::CLOEXEC
            } else {
                SocketFlags::NONBLOCK | SocketFlags::CLOEXEC
            },
            None,
        )
        .context("socket")?;
        rustix::net::sockopt::set_tcp_nodelay(&socket, true).context("TCP_NODELAY")?;
        if let Some(size) = self.send_buffer_size {
            rustix::net::sockopt::set_socket_send_buffer_size(&socket, size)
                .context("SO_SNDBUF")?;
        }
        if !self.options.sources.is_empty() {
            let source = self.options.sources[self.source_next % self.options.sources.len()];
            self.source_next += 1;
            rustix::net::bind(&socket, &SocketAddr::from((source, 0)))
                .with_context(|| format!("no free port at {source}"))?;
        }
        match rustix::net::connect(&socket, &self.target) {
            Ok(()) | Err(Errno::INPROGRESS) => {}
            Err(error) => return Err(error.into()),
        }
        let mut stream = Transport::new(socket.into(), self.options.tls.as_ref())?;
        self.poll
            .registry()
            .register(
                stream.socket(),
                Token(index),
                Interest::READABLE | Interest::WRITABLE,
            )
            .context("epoll_ctl")?;
        Ok(stream)
    }

    /// Does what the connection's socket allows now. Spurious calls are harmless.
    fn advance(&mut self, index: usize) -> Progress {
        let connection = &mut self.connections[index];
        let Some(stream) = &mut connection.stream else {
            return Progress::Waiting;
        };
        let is_unsent =
            connection.sent < self.requests[connection.request].bytes.len() || stream.has_unsent();
        if connection.phase == Phase::Connecting {
            let stream = stream.socket();
            match stream.take_error() {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => {
                    return Progress::Failed(format!("connect: {error}"));
                }
            }
            match stream.peer_addr() {
                Ok(_) => connection.phase = Phase::Awaiting,
                Err(error) if error.kind() == ErrorKind::NotConnected => return Progress::Waiting,
                Err(error) => return Progress::Failed(format!("connect: {error}")),
            }
        }
        let request = &self.requests[connection.request];
        let send_failed = match connection.phase {
            Phase::Awaiting if is_unsent => connection.send(request).err(),
            _ => None,
        };
        // A server that refuses a body answers before it resets, so the answer is looked for first.
        match (connection.receive(request, &self.options), send_failed) {
            (Progress::Waiting | Progress::Failed(_), Some(reason)) => Progress::Failed(reason),
            (progress, _) => progress,
        }
    }

    /// Counts what became of a connection's request and makes the connection ready for the next.
    fn settle(&mut self, index: usize, progress: Progress, now: Instant, outcome: &mut Outcome) {
        let connection = &mut self.connections[index];
        let keep = match progress {
            Progress::Waiting => unreachable!("a waiting connection has nothing to settle"),
            Progress::Answered {
                status,
                is_right,
                reusable,
            } => {
                let request = &self.requests[connection.request];
                outcome.answered += 1;
                *outcome.statuses.entry(status).or_default() += 1;
                if (200..300).contains(&status) {
                    outcome.record_count += request.record_count;
                    outcome.body_bytes += request.body_size as u64;
                }
                outcome.answers_wrong += u64::from(!is_right);
                let latency = now.duration_since(connection.started).as_nanos();
                let latency = u64::try_from(latency).unwrap_or(u64::MAX);
                outcome.latency.saturating_record(latency);
                if request.bytes.len() >= LARGE_FROM {
                    outcome.latency_large.saturating_record(latency);
                }
                reusable && !self.options.fresh_connections
            }
            Progress::Failed(reason) => {
                outcome.failures += 1;
                outcome.failure_first.get_or_insert(reason);
                false
            }
            Progress::ClosedIdle => {
                outcome.closed_idle += 1;
                connection.stream = None;
                // It is in the ready queue already.
                return;
            }
        };
        if !keep {
            connection.stream = None;
        }
        connection.phase = Phase::Idle;
        self.ready.push_back(index);
    }
}

impl Connection {
    /// Writes until the request is out or the socket is full.
    fn send(&mut self, request: &Request) -> Result<(), String> {
        let Some(stream) = &mut self.stream else {
            return Ok(());
        };
        while self.sent < request.bytes.len() {
            match stream.write(&request.bytes[self.sent..]) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(format!("send: {error}")),
            }
        }
        match stream.flush() {
            Err(error) if error.kind() != ErrorKind::WouldBlock => Err(format!("send: {error}")),
            _ => Ok(()),
        }
    }

    /// Reads until the answer is complete or the socket is empty.
    fn receive(&mut self, request: &Request, options: &ClientOptions) -> Progress {
        let Some(stream) = &mut self.stream else {
            return Progress::Waiting;
        };
        loop {
            if self.phase == Phase::Idle {
                // The last answer is done with; what comes now belongs to none.
                self.reader.reset();
            }
            let count = match stream.read(self.reader.space()) {
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Progress::Waiting,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(_) if self.phase == Phase::Idle => return Progress::ClosedIdle,
                Err(error) => return Progress::Failed(format!("receive: {error}")),
            };
            match (self.phase, count) {
                // Its end, or an answer to nothing, which the next request here would take for its own.
                (Phase::Idle, _) => return Progress::ClosedIdle,
                (_, 0) => {
                    return Progress::Failed("connection closed before the answer".to_owned());
                }
                _ => {}
            }
            match self.reader.advance(count) {
                // Read on even after a short read: an end that came with it has had its event already.
                Ok(None) => {}
                Ok(Some(answer)) => {
                    let is_success = (200..300).contains(&answer.status);
                    let is_checked = options.check_answers && is_success && answer.status != 204;
                    return Progress::Answered {
                        status: answer.status,
                        is_right: !is_checked || answer.body.trim_ascii() == request.answer,
                        reusable: !answer.closes && self.sent == request.bytes.len(),
                    };
                }
                Err(error) => return Progress::Failed(error.to_string()),
            }
        }
    }
}

/// Loopback addresses to connect from, so that none of them runs out of ports for `connection_count` connections.
pub fn loopback_sources(connection_count: u64, per_source: u64) -> Vec<Ipv4Addr> {
    let count = connection_count.div_ceil(per_source).clamp(1, 250) as u8;
    (1..=count)
        .map(|last| Ipv4Addr::new(127, 0, 0, last))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answerer::{Answerer, CREATED};

    fn options(connection_count: usize) -> ClientOptions {
        ClientOptions {
            connection_count,
            fresh_connections: false,
            check_answers: false,
            sources: Vec::new(),
            tls: None,
        }
    }

    fn requests(request_count_max: u64) -> Bounds {
        Bounds {
            request_count_max,
            duration_max: Duration::from_secs(60),
            in_flight_max: usize::MAX,
            rate: None,
        }
    }

    fn pool() -> Vec<Request> {
        vec![
            Request::single("{\"a\":1}"),
            Request::single(&weir_perf::event::large_event(1, 1)),
            Request::lines("{\"b\":2}\n{\"c\":3}\n"),
        ]
    }

    #[test]
    fn kept_alive_connections_carry_every_request_once() {
        let server = Answerer::start(None, |_| CREATED.to_vec()).expect("starts");
        let pool = pool();
        let mut client = Client::new(server.address(), &pool, options(7)).expect("loopback");
        let mut total = Outcome::new();
        for _ in 0..2 {
            total.add(&client.run(&requests(300)).expect("runs"));
        }
        total.require_success().expect("all answered");
        assert_eq!(total.statuses, BTreeMap::from([(201, 600)]));
        assert_eq!(total.record_count, 200 * (1 + 1 + 2));
        assert_eq!(total.latency.len(), 600);
        assert_eq!(client.open_count(), 7);
        assert_eq!(client.count_closed().expect("polls"), 0);
        drop(client);
        let seen = server.stop();
        assert_eq!(seen.requests, 600);
        assert_eq!(seen.connections, 7);
        assert_eq!(seen.body_bytes, total.body_bytes);
    }

    #[test]
    fn fresh_connections_carry_one_request_each() {
        let server = Answerer::start(None, |_| CREATED.to_vec()).expect("starts");
        let pool = pool();
        let options = ClientOptions {
            fresh_connections: true,
            sources: loopback_sources(3, 1),
            ..options(3)
        };
        let mut client = Client::new(server.address(), &pool, options).expect("loopback");
        let outcome = client.run(&requests(90)).expect("runs");
        outcome.require_success().expect("all answered");
        assert_eq!(client.open_count(), 0);
        let seen = server.stop();
        assert_eq!((seen.requests, seen.connections), (90, 90));
    }

    #[test]
    fn each_connection_gets_a_turn_when_few_requests_may_be_out() {
        let server = Answerer::start(None, |_| CREATED.to_vec()).expect("starts");
        let pool = vec![Request::single("{}")];
        let mut client = Client::new(server.address(), &pool, options(50)).expect("loopback");
        let bounds = Bounds {
            in_flight_max: 4,
            ..requests(50)
        };
        let outcome = client.run(&bounds).expect("runs");
        outcome.require_success().expect("all answered");
        assert_eq!(client.open_count(), 50);
    }

    #[test]
    fn only_active_connections_carry_requests_and_at_their_rate() {
        let server = Answerer::start(None, |_| CREATED.to_vec()).expect("starts");
        let pool = pool();
        let mut client = Client::new(server.address(), &pool, options(10)).expect("loopback");
        for active in [2..5, 4..8] {
            client.activate(active);
            let bounds = Bounds {
                rate: Some(10_000.0),
                ..requests(300)
            };
            let outcome = client.run(&bounds).expect("runs");
            outcome.require_success().expect("all answered");
            assert_eq!(outcome.answered, 300);
            // The last one is due after as many intervals as there are requests before it.
            assert!(outcome.elapsed >= Duration::from_micros(29_900));
            assert_eq!(outcome.latency_large.len(), 100);
            assert_eq!(outcome.latency_small().len(), 200);
        }
        assert_eq!(client.open_count(), 6);
        assert_eq!(server.stop().connections, 6);
    }

    #[test]
    fn statuses_are_counted_and_nothing_is_sent_twice() {
        let server = Answerer::start(None, |number| {
            if number % 3 == 0 {
                b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    .to_vec()
            } else {
                b"HTTP/1.1 204 No Content\r\n\r\n".to_vec()
            }
        })
        .expect("starts");
        let pool = vec![Request::single("{}")];
        let mut client = Client::new(server.address(), &pool, options(2)).expect("loopback");
        let outcome = client.run(&requests(30)).expect("runs");
        assert_eq!(outcome.statuses, BTreeMap::from([(204, 20), (503, 10)]));
        assert_eq!(outcome.failures, 0);
        assert!(outcome.require_success().is_err());
        assert_eq!(server.stop().requests, 30);
    }

    #[test]
    fn a_wrong_answer_is_noticed() {
        let server = Answerer::start(None, |number| {
            let body = if number == 5 { 0 } else { 1 };
            format!("HTTP/1.1 201 Created\r\nContent-Length: 15\r\n\r\n{{\"accepted\":{body}}}\n")
                .into_bytes()
        })
        .expect("starts");
        let pool = vec![Request::single("{}")];
        let options = ClientOptions {
            check_answers: true,
            ..options(2)
        };
        let mut client = Client::new(server.address(), &pool, options).expect("loopback");
        let outcome = client.run(&requests(30)).expect("runs");
        assert_eq!((outcome.answered, outcome.answers_wrong), (30, 1));
        assert!(outcome.require_success().is_err());
    }

    #[test]
    fn half_an_answer_is_a_failure() {
        let server = Answerer::start(None, |number| {
            if number == 2 {
                // Empty: the stand-in ends the connection.
                Vec::new()
            } else {
                CREATED.to_vec()
            }
        })
        .expect("starts");
        let pool = vec![Request::single("{}")];
        let mut client = Client::new(server.address(), &pool, options(1)).expect("loopback");
        let outcome = client.run(&requests(5)).expect("runs");
        assert_eq!((outcome.answered, outcome.failures), (4, 1));
        assert!(outcome.require_success().is_err());
    }

    #[test]
    fn a_server_that_is_gone_ends_the_run() {
        let server = Answerer::start(None, |_| CREATED.to_vec()).expect("starts");
        let address = server.address();
        server.stop();
        let pool = vec![Request::single("{}")];
        let mut client = Client::new(address, &pool, options(2)).expect("loopback");
        let outcome = client.run(&requests(u64::MAX)).expect("runs");
        assert_eq!(outcome.answered, 0);
        assert!(outcome.failures >= FAILURES_MAX);
    }

    #[test]
    fn only_loopback_is_a_target() {
        let pool = vec![Request::single("{}")];
        for (target, allowed) in [
            ("127.0.0.1:1", true),
            ("127.9.9.9:1", true),
            ("[::1]:1", true),
            ("0.0.0.0:1", false),
            ("192.0.2.1:80", false),
            ("[2001:db8::1]:80", false),
        ] {
            let target = target.parse().expect("an address");
            assert_eq!(Client::new(target, &pool, options(1)).is_ok(), allowed);
        }
    }

    #[test]
    fn sources_are_enough_and_loopback() {
        assert_eq!(loopback_sources(1, 20_000), [Ipv4Addr::LOCALHOST]);
        assert_eq!(loopback_sources(50_000, 20_000).len(), 3);
        assert_eq!(loopback_sources(u64::MAX, 1).len(), 250);
    }
}
