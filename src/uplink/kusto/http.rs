//! The HTTP client: requests out, bounded answers in.
//!
//! Before it: `management.rs`, `storage.rs` and `identity.rs` have a URL whose host is trusted.
//! After it: they read the answer.
//! Thread: the uplink's runtime. Allocates: per request, bounded by the answer's limit.
//! Invariant: no redirect is followed, no answer is read further than its limit, and no error names a URL, since the
//! query of one may be a signature.
//! Not here: retries, and what a status means.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reqwest::header::{DATE, HeaderMap, HeaderName, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, Response, Url, redirect};

use super::trusted::is_loopback;
use crate::error::{Fatal, Remedy, UploadError, UploadStep};
use crate::limits::{AZURE_CONNECT_TIMEOUT, LOCAL_CONNECT_TIMEOUT, RETRY_AFTER_MAX};

const ERROR_CODE: HeaderName = HeaderName::from_static("x-ms-error-code");
/// Kusto's name for a request in its logs, and storage's.
const ACTIVITY_ID: HeaderName = HeaderName::from_static("x-ms-activity-id");
const REQUEST_ID: HeaderName = HeaderName::from_static("x-ms-request-id");

/// Connections to Azure, and to this machine.
#[derive(Clone, Debug)]
pub struct Http {
    /// Through the proxy that the environment names, if it names one.
    outward: Client,
    /// Never through a proxy: the metadata service gives its tokens to whoever asks.
    local: Client,
}

/// An answer, read in full or up to its limit.
pub struct Answer {
    pub status: u16,
    /// The storage services' own code.
    pub error_code: Option<String>,
    pub retry_after: Option<Duration>,
    /// How far this machine's clock is ahead of the service's.
    pub clock_skew: Option<SignedDuration>,
    /// What the service calls this request.
    pub activity_id: Option<String>,
    pub body: Vec<u8>,
}

/// No answer: whether the service has acted is not known.
#[derive(Debug)]
pub struct Unanswered {
    pub code: &'static str,
    pub detail: String,
}

impl Http {
    pub fn new() -> Result<Self, Fatal> {
        let client = |connect_timeout| {
            Client::builder()
                .redirect(redirect::Policy::none())
                .referer(false)
                .connect_timeout(connect_timeout)
                .user_agent(concat!("weir/", env!("CARGO_PKG_VERSION")))
        };
        let fatal = |error: reqwest::Error| Fatal::Io {
            action: "making the HTTP client".into(),
            source: std::io::Error::other(error.without_url()),
        };
        Ok(Http {
            outward: client(AZURE_CONNECT_TIMEOUT).build().map_err(fatal)?,
            local: client(LOCAL_CONNECT_TIMEOUT)
                .no_proxy()
                .build()
                .map_err(fatal)?,
        })
    }

    /// The client for a host.
    pub fn client(&self, url: &Url) -> &Client {
        // RFC 3927: the metadata service has a link-local address.
        let is_local = |host: &str| is_loopback(host) || host.starts_with("169.254.");
        match url.host_str().is_some_and(is_local) {
            true => &self.local,
            false => &self.outward,
        }
    }
}

/// Sends a request and reads its answer, all within `timeout`; more than `size_max` bytes of body are left unread.
pub async fn send(
    request: RequestBuilder,
    timeout: Duration,
    size_max: usize,
) -> Result<Answer, Unanswered> {
    let mut response = request
        .timeout(timeout)
        .send()
        .await
        .map_err(Unanswered::from)?;
    let mut answer = Answer::new(response.status().as_u16(), response.headers());
    answer.body = read_body(&mut response, size_max).await?;
    Ok(answer)
}

/// The body, up to `size_max` bytes of it.
pub async fn read_body(
    response: &mut Response,
    size_max: usize,
) -> Result<Vec<u8>, reqwest::Error> {
    let mut body = Vec::new();
    while body.len() < size_max {
        let Some(chunk) = response.chunk().await? else {
            break;
        };
        let room = size_max - body.len();
        body.extend_from_slice(&chunk[..chunk.len().min(room)]);
    }
    Ok(body)
}

impl Answer {
    fn new(status: u16, headers: &HeaderMap) -> Self {
        let text = |name| headers.get(name).and_then(|value| value.to_str().ok());
        let now = Timestamp::now();
        Answer {
            status,
            error_code: text(ERROR_CODE).map(word),
            retry_after: text(RETRY_AFTER).and_then(|text| retry_after(text, now)),
            clock_skew: text(DATE)
                .and_then(http_date)
                .map(|date| now.duration_since(date)),
            activity_id: text(ACTIVITY_ID).or(text(REQUEST_ID)).map(word),
            body: Vec::new(),
        }
    }

    /// The body's beginning as one line, for messages.
    pub fn excerpt(&self) -> String {
        one_line(&String::from_utf8_lossy(&self.body))
    }
}

impl From<reqwest::Error> for Unanswered {
    fn from(error: reqwest::Error) -> Self {
        let (is_timeout, is_connect) = (error.is_timeout(), error.is_connect());
        let error = error.without_url();
        let mut detail = error.to_string();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            detail = format!("{detail}: {error}");
            cause = error.source();
        }
        let code = if detail.contains("dns error") {
            "name_not_resolved"
        } else if is_connect {
            "not_connected"
        } else if is_timeout {
            "timeout"
        } else {
            "connection_broken"
        };
        Unanswered {
            code,
            detail: one_line(&detail),
        }
    }
}

impl Unanswered {
    pub fn at(self, step: UploadStep, host: &str) -> UploadError {
        UploadError {
            remedy: Remedy::Retry { after: None },
            step,
            code: self.code.into(),
            detail: format!("no answer from {host}: {}", self.detail),
        }
    }
}

/// RFC 9110 §10.2.3: a date or a number of seconds; capped, since a batch is not left alone for ever.
fn retry_after(text: &str, now: Timestamp) -> Option<Duration> {
    let asked = match text.trim().parse::<u64>() {
        Ok(seconds) => Duration::from_secs(seconds),
        // A date that has passed asks for no pause.
        Err(_) => http_date(text)?
            .duration_since(now)
            .try_into()
            .unwrap_or_default(),
    };
    Some(asked.min(RETRY_AFTER_MAX))
}

fn http_date(text: &str) -> Option<Timestamp> {
    let date = jiff::fmt::rfc2822::parse(text).ok()?;
    Some(date.timestamp())
}

/// A code or an id from the other side, fit for a log line.
fn word(text: &str) -> String {
    let is_allowed = |c: &char| c.is_ascii_alphanumeric() || "-_.;".contains(*c);
    text.chars().filter(is_allowed).take(128).collect()
}

/// Text from the other side, fit for a log line.
pub fn one_line(text: &str) -> String {
    let words: Vec<&str> = text.split_whitespace().collect();
    let line = words.join(" ");
    line.chars().filter(|c| !c.is_control()).take(500).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_are_seconds_or_dates_and_capped() {
        let now: Timestamp = "2026-11-24T10:00:00Z".parse().unwrap();
        for (text, expected) in [
            ("7", Some(7)),
            ("0", Some(0)),
            ("99999999", Some(300)),
            ("Tue, 24 Nov 2026 10:00:30 GMT", Some(30)),
            ("Tue, 24 Nov 2026 09:00:00 GMT", Some(0)),
            ("Wed, 25 Nov 2026 10:00:00 GMT", Some(300)),
            ("-1", None),
            ("soon", None),
        ] {
            assert_eq!(
                retry_after(text, now),
                expected.map(Duration::from_secs),
                "{text}"
            );
        }
    }

    #[test]
    fn text_from_the_other_side_is_one_short_line() {
        assert_eq!(word("Server\r\nBusy;1"), "ServerBusy;1");
        assert_eq!(one_line(" a\r\n  b\u{7}\tc "), "a b c");
        assert_eq!(one_line(&"x".repeat(10_000)).len(), 500);
    }

    #[tokio::test]
    async fn an_error_names_no_url() {
        let http = Http::new().unwrap();
        // Port 1 of loopback: nobody listens there.
        let url: Url = "http://127.0.0.1:1/c/b?sig=canary".parse().unwrap();
        let request = http.client(&url).put(url);
        let Err(unanswered) = send(request, AZURE_CONNECT_TIMEOUT, 1).await else {
            panic!("somebody answered");
        };
        assert_eq!(unanswered.code, "not_connected");
        let error = unanswered.at(UploadStep::PutBlob, "127.0.0.1");
        assert!(!format!("{error:?} {error}").contains("canary"), "{error}");
    }

    #[test]
    fn the_metadata_service_is_never_asked_through_a_proxy() {
        let http = Http::new().unwrap();
        for (url, is_local) in [
            (
                "http://169.254.169.254/metadata/identity/oauth2/token",
                true,
            ),
            ("http://localhost:1", true),
            ("https://login.microsoftonline.com", false),
        ] {
            let client = http.client(&url.parse().unwrap());
            assert_eq!(std::ptr::eq(client, &http.local), is_local, "{url}");
        }
    }
}
