//! The load over HTTP/2: one connection, many streams, on each the next request as soon as an answer is complete.
//!
//! The counterpart of `client` for `front_door`: the same requests and the same [`Outcome`].
//! Lives on the thread that calls [`Http2Client::run`], on a runtime of its own that has no other; allocates per request.
//!
//! Invariant: every request sent is counted once, as an answer by status or as a failure.
//! Not here: several connections, which `client` is for; and attacks, which are the server's tests.

use crate::client::{LARGE_FROM, Outcome};
use crate::request::Request;
use crate::transport;
use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use h2::client::SendRequest;
use rustls::ClientConfig;
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};
use tokio::task::LocalSet;
use tokio_rustls::TlsConnector;

/// How long a run waits for answers after its last request; then they count as failures.
const GRACE: Duration = Duration::from_secs(10);

/// What a stream sends, and the answer it wants.
struct Post {
    request: http::Request<()>,
    body: Bytes,
    record_count: u64,
    answer: Vec<u8>,
}

pub struct Http2Client {
    // Declared first, so that it is dropped first: its tasks are the connection.
    local: LocalSet,
    runtime: Runtime,
    sender: SendRequest<Bytes>,
    posts: Rc<Vec<Post>>,
    next: Rc<Cell<usize>>,
    stream_count: usize,
}

impl Http2Client {
    /// Makes the connection. An error if `target` is not a loopback address.
    pub fn connect(
        target: SocketAddr,
        requests: &[Request],
        stream_count: usize,
        tls: Option<Arc<ClientConfig>>,
    ) -> Result<Self> {
        ensure!(
            target.ip().is_loopback(),
            "{target} is not a loopback address; this tool loads only its own machine"
        );
        ensure!(!requests.is_empty(), "no requests to send");
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .context("a runtime")?;
        let local = LocalSet::new();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let uri: http::Uri = format!("{scheme}://{target}/perf").parse()?;
        let posts = requests.iter().map(|request| post(request, &uri));
        let posts = posts.collect::<Result<_>>()?;
        let sender = local.block_on(&runtime, async {
            let stream = TcpStream::connect(target).await.context("connect")?;
            stream.set_nodelay(true)?;
            match tls {
                None => handshake(stream, stream_count).await,
                Some(config) => {
                    let connector = TlsConnector::from(config);
                    let stream = connector.connect(transport::server_name(), stream).await;
                    handshake(stream.context("TLS handshake")?, stream_count).await
                }
            }
        })?;
        Ok(Http2Client {
            local,
            runtime,
            sender,
            posts: Rc::new(posts),
            next: Rc::new(Cell::new(0)),
            stream_count,
        })
    }

    /// Sends for a time, then waits for the answers that are out. The connection stays open for the next run.
    pub fn run(&mut self, duration: Duration) -> Result<Outcome> {
        let outcome = Rc::new(RefCell::new(Outcome::new()));
        let start = Instant::now();
        let deadline = start + duration;
        let last_answer = Rc::new(Cell::new(start));
        let tasks: Vec<_> = (0..self.stream_count)
            .map(|_| {
                let (posts, next) = (Rc::clone(&self.posts), Rc::clone(&self.next));
                let (outcome, last_answer) = (Rc::clone(&outcome), Rc::clone(&last_answer));
                let sender = self.sender.clone();
                self.local.spawn_local(async move {
                    while Instant::now() < deadline {
                        let post = &posts[next.get()];
                        next.set((next.get() + 1) % posts.len());
                        let began = Instant::now();
                        let exchanged = tokio::time::timeout_at(
                            (deadline + GRACE).into(),
                            exchange(&sender, post),
                        );
                        let result = match exchanged.await {
                            Ok(result) => result.map_err(|error| error.to_string()),
                            Err(_) => Err("no answer in time".to_owned()),
                        };
                        let now = Instant::now();
                        last_answer.set(now);
                        if !count(&mut outcome.borrow_mut(), post, result, now - began) {
                            break;
                        }
                    }
                })
            })
            .collect();
        self.local.block_on(&self.runtime, async {
            for task in tasks {
                task.await.context("a stream's task")?;
            }
            anyhow::Ok(())
        })?;
        let mut outcome = outcome.replace(Outcome::new());
        outcome.elapsed = last_answer.get() - start;
        Ok(outcome)
    }
}

fn post(request: &Request, uri: &http::Uri) -> Result<Post> {
    let body = Bytes::copy_from_slice(&request.bytes[request.bytes.len() - request.body_size..]);
    let head = http::Request::post(uri.clone())
        .header(http::header::CONTENT_TYPE, request.media_type())
        .header(http::header::CONTENT_LENGTH, body.len())
        .body(())?;
    Ok(Post {
        request: head,
        body,
        record_count: request.record_count,
        answer: request.answer.clone(),
    })
}

/// Begins HTTP/2 on a stream, and leaves its connection to a task.
async fn handshake(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    stream_count: usize,
) -> Result<SendRequest<Bytes>> {
    let (sender, connection) = h2::client::Builder::new()
        .initial_max_send_streams(stream_count)
        .enable_push(false)
        .handshake(stream)
        .await
        .context("HTTP/2 handshake")?;
    tokio::task::spawn_local(async move {
        // What fails it fails the streams, which count it.
        let _ = connection.await;
    });
    Ok(sender)
}

/// One request and its answer: status and body.
async fn exchange(sender: &SendRequest<Bytes>, post: &Post) -> Result<(u16, Vec<u8>), h2::Error> {
    let mut sender = sender.clone().ready().await?;
    let (response, mut stream) = sender.send_request(post.request.clone(), false)?;
    let mut rest = post.body.clone();
    while !rest.is_empty() {
        stream.reserve_capacity(rest.len());
        // No more capacity: the server has answered without the rest, or reset the stream, which the answer says.
        let Some(Ok(capacity)) = poll_fn(|context| stream.poll_capacity(context)).await else {
            break;
        };
        let piece = rest.split_to(capacity.min(rest.len()));
        stream.send_data(piece, rest.is_empty())?;
    }
    let response = response.await?;
    let status = response.status().as_u16();
    let mut incoming = response.into_body();
    let mut body = Vec::new();
    while let Some(piece) = incoming.data().await {
        let piece = piece?;
        incoming.flow_control().release_capacity(piece.len())?;
        body.extend_from_slice(&piece);
    }
    Ok((status, body))
}

/// Counts what became of a request; whether the next may follow.
fn count(
    outcome: &mut Outcome,
    post: &Post,
    result: Result<(u16, Vec<u8>), String>,
    latency: Duration,
) -> bool {
    match result {
        Ok((status, body)) => {
            outcome.answered += 1;
            *outcome.statuses.entry(status).or_default() += 1;
            if (200..300).contains(&status) {
                outcome.record_count += post.record_count;
                outcome.body_bytes += post.body.len() as u64;
                outcome.answers_wrong += u64::from(body.trim_ascii() != post.answer);
            }
            let nanoseconds = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
            outcome.latency.saturating_record(nanoseconds);
            if post.body.len() >= LARGE_FROM {
                outcome.latency_large.saturating_record(nanoseconds);
            }
            true
        }
        Err(reason) => {
            outcome.failures += 1;
            outcome.failure_first.get_or_insert(reason);
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Answers `answered` requests on each connection, with the size of their bodies as the number of records.
    fn server(answered: usize) -> SocketAddr {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("bound");
        listener.set_nonblocking(true).expect("for tokio");
        std::thread::spawn(move || {
            let runtime = Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            let local = LocalSet::new();
            local.block_on(&runtime, async {
                let listener = TcpListener::from_std(listener).expect("a listener");
                let (stream, _) = listener.accept().await.expect("a connection");
                let mut connection = h2::server::handshake(stream).await.expect("HTTP/2");
                for _ in 0..answered {
                    let Some(Ok((request, mut respond))) = connection.accept().await else {
                        return;
                    };
                    tokio::task::spawn_local(async move {
                        let mut body = request.into_body();
                        while let Some(Ok(piece)) = body.data().await {
                            let _ = body.flow_control().release_capacity(piece.len());
                        }
                        let response = http::Response::builder().status(201).body(());
                        if let Ok(mut stream) =
                            respond.send_response(response.expect("valid"), false)
                        {
                            let _ = stream.send_data("{\"accepted\":1}\n".into(), true);
                        }
                    });
                }
                if answered < usize::MAX {
                    connection.abrupt_shutdown(h2::Reason::INTERNAL_ERROR);
                }
                while let Some(Ok(_)) = connection.accept().await {}
            });
        });
        address
    }

    #[test]
    fn every_stream_carries_one_request_after_another() {
        let pool = [
            Request::single("{\"a\":1}"),
            Request::single(&weir_perf::event::large_event(1, 1)),
        ];
        let mut client =
            Http2Client::connect(server(usize::MAX), &pool, 10, None).expect("connects");
        let mut total = Outcome::new();
        for _ in 0..2 {
            total.add(&client.run(Duration::from_millis(200)).expect("runs"));
        }
        total.require_success().expect("all answered");
        assert!(total.answered >= 20, "{}", total.answered);
        assert_eq!(total.record_count, total.answered);
    }

    #[test]
    fn a_connection_that_ends_is_a_failure_of_each_stream() {
        let pool = [Request::single("{}")];
        let mut client = Http2Client::connect(server(25), &pool, 10, None).expect("connects");
        let outcome = client.run(Duration::from_secs(60)).expect("runs");
        assert!(outcome.answered <= 25);
        assert_eq!(outcome.failures, 10);
        assert!(outcome.require_success().is_err());
    }
}
