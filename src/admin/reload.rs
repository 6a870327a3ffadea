//! `POST /reload`: the one request to the admin server that changes something, and who may make it.
//!
//! Before it: a request on the admin address.
//! After it: [`crate::reload`] has read the configuration again, and its outcome is the answer.
//! Thread: the uplink's runtime. Allocates: per request; a body is never read, whatever its size.
//! Invariant: only a program on this machine can ask for a reload, and no page in a browser can make it: not by a link
//! (GET changes nothing), not from another site (`Origin`, `Sec-Fetch-Site`, a form's types), and not under a name of
//! its own that it lets point here (DNS rebinding: `Host` has to be this machine's).
//! Not here: who may read metrics and health: whoever reaches the address.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::uri::Authority;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;
use tokio::net::TcpListener;

use super::Shared;
use crate::reactor::Phase;

/// The two ends of a connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ends {
    peer: IpAddr,
    /// Nothing where the connection is gone already.
    local: Option<IpAddr>,
}

impl Connected<IncomingStream<'_, TcpListener>> for Ends {
    fn connect_info(stream: IncomingStream<'_, TcpListener>) -> Self {
        let local: Option<SocketAddr> = stream.io().local_addr().ok();
        Ends {
            peer: stream.remote_addr().ip().to_canonical(),
            local: local.map(|address| address.ip().to_canonical()),
        }
    }
}

/// 200 with the outcome as JSON, or 400 with what `weir check` would print.
pub(super) async fn reload(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(ends): ConnectInfo<Ends>,
    fields: HeaderMap,
) -> Response {
    if let Err((status, reason)) = ends.may_reload(&fields) {
        return (status, format!("{reason}\n")).into_response();
    }
    if *shared.phase.borrow() != Phase::Running {
        return (StatusCode::SERVICE_UNAVAILABLE, "draining\n").into_response();
    }
    match shared.reloader.clone().spawn().await {
        Ok(outcome) => Json(outcome).into_response(),
        Err(fatal) => {
            let report = format!("{}\n", fatal.report());
            (StatusCode::BAD_REQUEST, report).into_response()
        }
    }
}

impl Ends {
    fn may_reload(&self, fields: &HeaderMap) -> Result<(), (StatusCode, &'static str)> {
        // Whoever has this machine's address is on it: an answer to it never leaves.
        if !self.peer.is_loopback() && Some(self.peer) != self.local {
            return Err((
                StatusCode::FORBIDDEN,
                "a reload can be asked for on this machine only; send SIGHUP, or POST to a loopback address",
            ));
        }
        if fields.contains_key(header::ORIGIN) || fields.contains_key("sec-fetch-site") {
            return Err((
                StatusCode::FORBIDDEN,
                "a browser cannot ask for a reload; use curl -X POST",
            ));
        }
        // The types that a page may send to another site without asking it (Fetch, "CORS-safelisted request-header").
        let of_form = |value: &header::HeaderValue| {
            let value = value.to_str().unwrap_or_default().to_ascii_lowercase();
            [
                "application/x-www-form-urlencoded",
                "multipart/form-data",
                "text/plain",
            ]
            .iter()
            .any(|form| value.starts_with(form))
        };
        if fields.get_all(header::CONTENT_TYPE).iter().any(of_form) {
            return Err((
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "a form cannot ask for a reload; send no body, as curl -X POST does",
            ));
        }
        let mut hosts = fields.get_all(header::HOST).iter();
        let host = hosts.next().filter(|_| hosts.next().is_none());
        let is_ours = host
            .and_then(|host| Authority::try_from(host.as_bytes()).ok())
            // RFC 9110 §7.2: without userinfo.
            .is_some_and(|host| !host.as_str().contains('@') && self.is_named(host.host()));
        match is_ours {
            true => Ok(()),
            false => Err((
                StatusCode::FORBIDDEN,
                "Host has to be localhost, a loopback address or the address that was connected to",
            )),
        }
    }

    /// Whether this is a name of this machine that nobody else can give to it.
    fn is_named(&self, host: &str) -> bool {
        let literal = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        match literal.unwrap_or(host).parse::<IpAddr>() {
            Ok(address) => {
                let address = address.to_canonical();
                address.is_loopback() || Some(address) == self.local
            }
            Err(_) => host.eq_ignore_ascii_case("localhost"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(peer: &str, local: &str, fields: &[(&str, &str)]) -> u16 {
        let ends = Ends {
            peer: peer.parse().unwrap(),
            local: Some(local.parse().unwrap()),
        };
        let mut map = HeaderMap::new();
        for (name, value) in fields {
            let name = header::HeaderName::from_bytes(name.as_bytes()).unwrap();
            map.append(name, value.parse().unwrap());
        }
        match ends.may_reload(&map) {
            Ok(()) => 200,
            Err((status, _)) => status.as_u16(),
        }
    }

    #[test]
    fn only_this_machine_may_reload_and_only_by_a_name_of_its_own() {
        let here = "127.0.0.1";
        for (host, expected) in [
            ("localhost", 200),
            ("LOCALHOST:9881", 200),
            ("127.0.0.1:9881", 200),
            ("127.1.2.3", 200),
            ("[::1]:9881", 200),
            ("[::ffff:127.0.0.1]", 200),
            ("evil.example", 403),
            ("localhost.evil.example", 403),
            ("evil.example@127.0.0.1", 403),
            ("10.0.0.5", 403),
            ("0.0.0.0:9881", 403),
            ("localhost:9881/", 403),
            ("", 403),
        ] {
            assert_eq!(answer(here, here, &[("host", host)]), expected, "{host}");
        }
        assert_eq!(answer(here, here, &[]), 403, "no Host");
        let twice = [("host", "localhost"), ("host", "localhost")];
        assert_eq!(answer(here, here, &twice), 403);
        // On an address of the network: from there, but not from elsewhere.
        let host = [("host", "10.0.0.5:9881")];
        assert_eq!(answer("10.0.0.5", "10.0.0.5", &host), 200);
        assert_eq!(answer("10.0.0.6", "10.0.0.5", &host), 403);
        assert_eq!(
            answer("10.0.0.6", "10.0.0.5", &[("host", "localhost")]),
            403
        );
    }

    #[test]
    fn no_page_in_a_browser_may_reload() {
        let here = "::1";
        for (name, value, expected) in [
            ("origin", "http://localhost:9881", 403),
            ("origin", "null", 403),
            ("sec-fetch-site", "same-origin", 403),
            ("content-type", "text/plain;charset=UTF-8", 415),
            ("content-type", "application/x-www-form-urlencoded", 415),
            ("content-type", "Multipart/Form-Data; boundary=x", 415),
            ("content-type", "application/json", 200),
        ] {
            let fields = [("host", "localhost"), (name, value)];
            assert_eq!(answer(here, here, &fields), expected, "{name}: {value}");
        }
    }
}
