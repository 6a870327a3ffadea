//! The token endpoints of Entra and of a virtual machine (IMDS), and the tokens they gave.
//!
//! Before it: a client proves who it is. After it: [`super::mgmt`] asks whether a bearer token holds.
//! Thread: the runtime's. Allocates: per token, up to a bound.
//! Invariant: a token holds only if it was given here, for Kusto's audience, and has not expired.
//! Not here: TLS, the v1 endpoint, App Service and Arc identities.
//!
//! Simplified: the signature of a client assertion is not checked, only its claims.
//! Source: Microsoft Entra, "OAuth 2.0 client credentials flow"; Azure, "How to use managed identities on a VM".

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use axum::Json;
use axum::extract::{Form, Path, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Service;
use super::clock::later;
use super::storage::Query;

/// What tokens are for: `KustoServiceResourceId` of the public cloud.
pub(super) const RESOURCE: &str = "https://kusto.kusto.windows.net";
/// Other audiences that Kusto takes.
const RESOURCES_ACCEPTED: &[&str] = &[
    RESOURCE,
    "https://api.kusto.windows.net",
    "https://help.kusto.windows.net",
];
/// Tokens that may be good at one time.
const TOKEN_COUNT_MAX: usize = 100_000;
const ASSERTION_TYPE: &str = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer";

/// Tokens by their text, with the end of their life.
#[derive(Default)]
pub(super) struct Tokens {
    good: Mutex<HashMap<String, Timestamp>>,
}

impl Tokens {
    pub fn add(&self, token: String, expires: Timestamp, now: Timestamp) {
        let mut good = self.good.lock().unwrap();
        if good.len() >= TOKEN_COUNT_MAX {
            good.retain(|_, expires| *expires > now);
        }
        good.insert(token, expires);
    }

    pub fn holds(&self, token: &str, now: Timestamp) -> bool {
        let good = self.good.lock().unwrap();
        good.get(token).is_some_and(|expires| *expires > now)
    }

    /// Ends the life of all.
    pub fn expire(&self) {
        self.good.lock().unwrap().clear();
    }
}

/// The bearer token of a request.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    value.strip_prefix("Bearer ")
}

fn accepted(service: &Service, resource: &str) -> bool {
    RESOURCES_ACCEPTED.contains(&resource) || resource == service.uri()
}

/// A token that looks like one: three parts, claims that a client may read, a signature that nobody can make.
fn issue(service: &Service, audience: &str, now: Timestamp) -> String {
    let claims = json!({
        "aud": audience,
        "appid": service.options.client_id,
        "tid": service.options.tenant,
        "iat": now.as_second(),
        "exp": later(now, service.options.token_lifetime).as_second(),
    });
    let part = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let signature = [Uuid::new_v4().into_bytes(), Uuid::new_v4().into_bytes()].concat();
    let header = br#"{"typ":"JWT","alg":"RS256","kid":"standin"}"#;
    let claims = claims.to_string();
    let token = format!(
        "{}.{}.{}",
        part(header),
        part(claims.as_bytes()),
        part(&signature)
    );
    let expires = later(now, service.options.token_lifetime);
    service.tokens.add(token.clone(), expires, now);
    service.journal.secret(token.clone());
    token
}

/// An error answer of the token endpoint.
pub(super) fn refusal(status: u16, error: &str, description: &str) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
    let number = description
        .strip_prefix("AADSTS")
        .and_then(|text| text.split(':').next()?.parse::<u32>().ok());
    let body = json!({
        "error": error,
        "error_description": description,
        "error_codes": number.into_iter().collect::<Vec<_>>(),
        "timestamp": Timestamp::now().strftime("%Y-%m-%d %H:%M:%SZ").to_string(),
        "trace_id": Uuid::new_v4().to_string(),
        "correlation_id": Uuid::new_v4().to_string(),
    });
    (status, Json(body)).into_response()
}

/// `POST /{tenant}/oauth2/v2.0/token`.
pub(super) async fn token(
    State(service): State<Arc<Service>>,
    Path(tenant): Path<String>,
    Form(form): Form<HashMap<String, String>>,
) -> Response {
    let field = |name: &str| form.get(name).map_or("", String::as_str);
    for name in ["client_secret", "client_assertion"] {
        if !field(name).is_empty() {
            service.journal.secret(field(name));
        }
    }
    let options = &service.options;
    if tenant != options.tenant {
        let description = format!("AADSTS90002: Tenant '{tenant}' not found.");
        return refusal(400, "invalid_request", &description);
    }
    if field("grant_type") != "client_credentials" {
        let description = "AADSTS70003: The app requested an unsupported grant type.";
        return refusal(400, "unsupported_grant_type", description);
    }
    if field("client_id") != options.client_id {
        let description = "AADSTS700016: Application was not found in the directory.";
        return refusal(400, "unauthorized_client", description);
    }
    let now = service.clock.now();
    let proven = if form.contains_key("client_assertion") {
        if field("client_assertion_type") != ASSERTION_TYPE {
            let description =
                "AADSTS50027: JWT token is invalid or malformed: client_assertion_type.";
            return refusal(400, "invalid_request", description);
        }
        let endpoint = format!("{}/{tenant}/oauth2/v2.0/token", service.uri());
        check_assertion(field("client_assertion"), options, &endpoint, now)
    } else if field("client_secret") == options.client_secret {
        Ok(())
    } else {
        Err("AADSTS7000215: Invalid client secret provided.".into())
    };
    if let Err(description) = proven {
        return refusal(401, "invalid_client", &description);
    }
    let resource = field("scope").strip_suffix("/.default").unwrap_or_default();
    if !accepted(&service, resource) {
        let description = format!(
            "AADSTS500011: The resource principal named {resource} was not found; the scope must be RESOURCE/.default."
        );
        return refusal(400, "invalid_resource", &description);
    }
    let seconds = options.token_lifetime.as_secs();
    Json(json!({
        "token_type": "Bearer",
        "expires_in": seconds,
        "ext_expires_in": seconds,
        "access_token": issue(&service, resource, now),
    }))
    .into_response()
}

/// A federated token is compared with the one that is expected; every other assertion is the client's own (RFC 7523 §3).
fn check_assertion(
    assertion: &str,
    options: &super::StandinOptions,
    endpoint: &str,
    now: Timestamp,
) -> Result<(), String> {
    if options.federated_token.as_deref() == Some(assertion) {
        return Ok(());
    }
    let claims = assertion.split('.').nth(1);
    let claims: Value = claims
        .and_then(|part| URL_SAFE_NO_PAD.decode(part).ok())
        .and_then(|bytes| serde_json::from_slice(&bytes).ok())
        .ok_or("AADSTS50027: JWT token is invalid or malformed.")?;
    if claims["iss"] != options.client_id || claims["sub"] != options.client_id {
        return Err("AADSTS700213: No matching federated identity record found.".into());
    }
    if claims["aud"] != endpoint {
        return Err(format!(
            "AADSTS700023: Client assertion audience claim does not match {endpoint}."
        ));
    }
    if claims["jti"].as_str().is_none_or(str::is_empty) {
        return Err("AADSTS50027: JWT token is invalid or malformed: no jti.".into());
    }
    if claims["exp"]
        .as_i64()
        .is_none_or(|end| end <= now.as_second())
    {
        return Err("AADSTS700024: Client assertion is not within its valid time range.".into());
    }
    Ok(())
}

/// `GET /metadata/identity/oauth2/token`.
pub(super) async fn imds(
    State(service): State<Arc<Service>>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let invalid = |description: &str| {
        let body = json!({"error": "invalid_request", "error_description": description});
        (StatusCode::BAD_REQUEST, Json(body)).into_response()
    };
    if headers.get("metadata").map(|value| value.as_bytes()) != Some(b"true") {
        return invalid("Required metadata header not specified");
    }
    let query = Query::of(&uri);
    if query.get("api-version").is_none() {
        return invalid("Required query variable 'api-version' is missing");
    }
    let resource = query
        .get("resource")
        .unwrap_or_default()
        .trim_end_matches('/');
    if !accepted(&service, resource) {
        return invalid(
            "AADSTS500011: the resource principal was not found; it takes no /.default here",
        );
    }
    let options = &service.options;
    if query
        .get("client_id")
        .is_some_and(|id| id != options.client_id)
    {
        return invalid("Identity not found");
    }
    let now = service.clock.now();
    let seconds = options.token_lifetime.as_secs().to_string();
    Json(json!({
        "access_token": issue(&service, resource, now),
        "client_id": options.client_id,
        "expires_in": seconds,
        "ext_expires_in": seconds,
        "expires_on": later(now, options.token_lifetime).as_second().to_string(),
        "not_before": now.as_second().to_string(),
        "resource": resource,
        "token_type": "Bearer",
    }))
    .into_response()
}
