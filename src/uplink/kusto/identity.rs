//! Identity: from the configured identity to a token, by azure_identity over weir's own HTTP client.
//!
//! Before it: `management.rs` has asked the endpoint where to log in and for which audience.
//! After it: `token.rs` keeps the token.
//! Thread: the uplink's runtime. Allocates: per token.
//! Invariant: secrets are read anew for each token, so a rotated file is seen, and none is in an error.
//! Not here: caching. The library's own begins to renew five minutes before the end and fails when that fails, so
//! each token comes from a new credential.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use azure_core::cloud::CustomConfiguration;
use azure_core::credentials::{Secret as AzureSecret, TokenCredential};
use azure_core::error::ErrorKind;
use azure_core::http::headers::{HeaderName, HeaderValue, Headers};
use azure_core::http::{
    AsyncRawResponse, Body, ClientMethodOptions, ClientOptions, ExponentialRetryOptions,
    HttpClient, Method, Request, RetryOptions, Transport,
};
use azure_identity::{
    AzureCliCredential, ClientAssertion, ClientAssertionCredential,
    ClientAssertionCredentialOptions, ClientSecretCredential, ClientSecretCredentialOptions,
    ManagedIdentityCredential, ManagedIdentityCredentialOptions, UserAssignedId,
};
use jiff::Timestamp;
use reqwest::Url;

use super::certificate::Certificate;
use super::http::{Http, Unanswered, one_line, read_body};
use super::management::Endpoint;
use super::token::{Issuer, Token};
use super::trusted::is_loopback;
use crate::config::Identity;
use crate::error::{Remedy, UploadError, UploadStep};
use crate::limits::{MANAGEMENT_ANSWER_SIZE_MAX, TOKEN_RETRY_COUNT_MAX, TOKEN_TIMEOUT};
use crate::secret::{Secret, SecretSource};

/// Gets tokens for one endpoint's audience.
pub struct IdentityIssuer {
    pub identity: Identity,
    pub endpoint: Arc<Endpoint>,
}

#[async_trait]
impl Issuer for IdentityIssuer {
    async fn issue(&self) -> Result<Token, UploadError> {
        let metadata = self.endpoint.auth_metadata().await?;
        let credential = credential(&self.identity, self.endpoint.http(), &metadata.login)?;
        let scopes = [metadata.scope.as_str()];
        let token = tokio::time::timeout(TOKEN_TIMEOUT, credential.get_token(&scopes, None))
            .await
            .map_err(|_| {
                let detail = format!("no token within {} s", TOKEN_TIMEOUT.as_secs());
                error(Remedy::Retry { after: None }, "timeout", detail)
            })?
            .map_err(|failed| refused(&self.identity, &failed))?;
        let lifetime = token.expires_on.unix_timestamp() - Timestamp::now().as_second();
        let secret = Secret::new(token.token.secret());
        Ok(Token::new(
            secret,
            Duration::from_secs(lifetime.max(0).unsigned_abs()),
        ))
    }
}

/// A credential that logs in at `login`.
fn credential(
    identity: &Identity,
    http: &Http,
    login: &Url,
) -> Result<Arc<dyn TokenCredential>, UploadError> {
    let options = client_options(http, login);
    let made: azure_core::Result<Arc<dyn TokenCredential>> = match identity {
        Identity::Managed { client_id } => {
            let options = ManagedIdentityCredentialOptions {
                user_assigned_id: client_id.clone().map(UserAssignedId::ClientId),
                client_options: options,
            };
            ManagedIdentityCredential::new(Some(options)).map(|made| made as _)
        }
        Identity::Workload {
            tenant,
            client_id,
            token_file,
        } => {
            let tenant = or_variable(tenant.clone(), "AZURE_TENANT_ID")?;
            let client_id = or_variable(client_id.clone(), "AZURE_CLIENT_ID")?;
            let token_file = token_file.as_ref().map(|path| path.display().to_string());
            let token_file = or_variable(token_file, "AZURE_FEDERATED_TOKEN_FILE")?;
            let assertion = FederatedToken(PathBuf::from(token_file));
            assertion_credential(tenant, client_id, assertion, options)
        }
        Identity::ClientSecret {
            tenant,
            client_id,
            secret,
        } => {
            let secret = read(secret)?;
            let secret = AzureSecret::new(secret.expose().to_owned());
            let options = ClientSecretCredentialOptions {
                client_options: options,
            };
            ClientSecretCredential::new(tenant, client_id.clone(), secret, Some(options))
                .map(|made| made as _)
        }
        Identity::ClientCertificate {
            tenant,
            client_id,
            certificate,
        } => {
            let certificate = Certificate::parse(&read(certificate)?)
                .map_err(|detail| error(Remedy::Park, "certificate_invalid", detail))?;
            let assertion = CertificateAssertion {
                certificate,
                client_id: client_id.clone(),
                audience: token_endpoint(login, tenant),
            };
            assertion_credential(tenant.clone(), client_id.clone(), assertion, options)
        }
        Identity::AzureCli => AzureCliCredential::new(None).map(|made| made as _),
    };
    made.map_err(|failed| {
        error(
            Remedy::Park,
            "identity_unusable",
            one_line(&failed.to_string()),
        )
    })
}

fn assertion_credential(
    tenant: String,
    client_id: String,
    assertion: impl ClientAssertion + 'static,
    client_options: ClientOptions,
) -> azure_core::Result<Arc<dyn TokenCredential>> {
    let options = ClientAssertionCredentialOptions { client_options };
    ClientAssertionCredential::new(tenant, client_id, assertion, Some(options))
        .map(|made| made as _)
}

/// The library takes an authority with TLS only; a stand-in on loopback has none, which the transport alone knows.
fn client_options(http: &Http, login: &Url) -> ClientOptions {
    let is_plain = login.scheme() == "http" && login.host_str().is_some_and(is_loopback);
    let authority = login.as_str().replacen("http://", "https://", 1);
    let mut cloud = CustomConfiguration::default();
    cloud.authority_host = authority;
    let transport = IdentityTransport {
        http: http.clone(),
        is_plain,
    };
    ClientOptions {
        // The metadata service of a machine has retries of its own in the library; the refresher tries all again.
        retry: RetryOptions::exponential(ExponentialRetryOptions {
            max_retries: TOKEN_RETRY_COUNT_MAX,
            ..ExponentialRetryOptions::default()
        }),
        cloud: Some(Arc::new(cloud.into())),
        transport: Some(Transport::new(Arc::new(transport))),
        ..ClientOptions::default()
    }
}

fn token_endpoint(login: &Url, tenant: &str) -> String {
    let login = login.as_str().trim_end_matches('/');
    format!("{login}/{tenant}/oauth2/v2.0/token")
}

fn or_variable(value: Option<String>, variable: &str) -> Result<String, UploadError> {
    let value = value.or_else(|| std::env::var(variable).ok());
    value.filter(|value| !value.is_empty()).ok_or_else(|| {
        let detail = format!(
            "workload identity needs the variable {variable}; label the pod with \
             azure.workload.identity/use, or set the key in the configuration"
        );
        error(Remedy::Park, "variable_missing", detail)
    })
}

fn read(source: &SecretSource) -> Result<Secret, UploadError> {
    let secret = source.read();
    secret.map_err(|failed| error(Remedy::Park, "secret_unreadable", failed.to_string()))
}

fn error(remedy: Remedy, code: &str, detail: String) -> UploadError {
    UploadError {
        remedy,
        step: UploadStep::Token,
        code: code.into(),
        detail,
    }
}

/// What a failed token request means.
fn refused(identity: &Identity, failed: &azure_core::Error) -> UploadError {
    // The library wraps the answer's error into one of its own.
    let mut http = None;
    let mut innermost = String::new();
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(failed);
    while let Some(inner) = cause {
        if let Some(inner) = inner.downcast_ref::<azure_core::Error>()
            && let ErrorKind::HttpResponse {
                status, error_code, ..
            } = inner.kind()
        {
            http = Some((u16::from(*status), error_code.clone()));
        }
        innermost = inner.to_string();
        cause = inner.source();
    }
    let message = failed.to_string();
    // What follows is a link for developers of the library.
    let message = message
        .split("\nTo troubleshoot")
        .next()
        .unwrap_or_default();
    let message = match message.contains(innermost.trim()) {
        true => one_line(message),
        // After its last retry the library says only that it was the last.
        false => one_line(&format!("{message}: {innermost}")),
    };
    let Some((status, code)) = http else {
        // The Azure CLI says in its message what to do; all else here is a broken connection.
        let remedy = match identity {
            Identity::AzureCli => Remedy::Park,
            _ => Remedy::Retry { after: None },
        };
        return error(remedy, "no_token", message);
    };
    let code = match code {
        Some(numbers) => format!("AADSTS{numbers}"),
        None => format!("http_{status}"),
    };
    // RFC 6749 §5.2: 400 and 401 are errors of who asks.
    let is_permanent = (400..500).contains(&status) && !matches!(status, 404 | 408 | 410 | 429);
    let remedy = match is_permanent {
        true => Remedy::Park,
        false => Remedy::Retry { after: None },
    };
    let hint = match identity {
        Identity::Managed { .. } => "; check that the identity is assigned to this machine",
        Identity::Workload { .. } => "; check the federated credential of the application",
        Identity::ClientSecret { .. } => "; check tenant, client_id and secret, and its expiry",
        Identity::ClientCertificate { .. } => {
            "; check tenant and client_id, and that the certificate is the application's"
        }
        Identity::AzureCli => "; run az login",
    };
    let detail = match is_permanent {
        true => format!("{message}{hint}"),
        false => message,
    };
    error(remedy, &code, detail)
}

/// The token of a Kubernetes service account. The kubelet rotates the file, so it is read each time.
#[derive(Debug)]
struct FederatedToken(PathBuf);

#[async_trait]
impl ClientAssertion for FederatedToken {
    async fn secret(&self, _: Option<ClientMethodOptions<'_>>) -> azure_core::Result<String> {
        let token = SecretSource::File(self.0.clone()).read();
        token
            .map(|token| token.expose().to_owned())
            .map_err(|failed| azure_core::Error::new(ErrorKind::Credential, failed))
    }
}

struct CertificateAssertion {
    certificate: Certificate,
    client_id: String,
    audience: String,
}

impl std::fmt::Debug for CertificateAssertion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertificateAssertion")
            .field("client_id", &self.client_id)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl ClientAssertion for CertificateAssertion {
    async fn secret(&self, _: Option<ClientMethodOptions<'_>>) -> azure_core::Result<String> {
        let assertion =
            self.certificate
                .assertion(&self.client_id, &self.audience, Timestamp::now());
        Ok(assertion.expose().to_owned())
    }
}

/// The library's requests on weir's client.
#[derive(Debug)]
struct IdentityTransport {
    http: Http,
    /// The login endpoint is a stand-in on loopback, without TLS.
    is_plain: bool,
}

#[async_trait]
impl HttpClient for IdentityTransport {
    async fn execute_request(&self, request: &Request) -> azure_core::Result<AsyncRawResponse> {
        let mut url = request.url().clone();
        if self.is_plain && url.host_str().is_some_and(is_loopback) && url.scheme() == "https" {
            let port = url.port_or_known_default();
            let changed = url.set_scheme("http").and_then(|()| url.set_port(port));
            assert!(changed.is_ok(), "a URL with a host takes scheme and port");
        }
        let Body::Bytes(body) = request.body() else {
            let message = "a token request with a stream for a body";
            return Err(azure_core::Error::with_message(ErrorKind::Other, message));
        };
        let client = self.http.client(&url);
        let mut outgoing = match request.method() {
            Method::Post => client.post(url),
            _ => client.get(url),
        };
        for (name, value) in request.headers().iter() {
            outgoing = outgoing.header(name.as_str(), value.as_str());
        }
        let broken = |error: reqwest::Error| {
            let is_connect = error.is_connect();
            let unanswered = Unanswered::from(error);
            let message = format!("{}: {}", unanswered.code, unanswered.detail);
            let kind = match is_connect {
                true => ErrorKind::Connection,
                false => ErrorKind::Io,
            };
            azure_core::Error::with_message(kind, message)
        };
        let mut answer = outgoing.body(body.clone()).send().await.map_err(broken)?;
        let status = answer.status().as_u16().into();
        let headers = answer.headers().iter().filter_map(|(name, value)| {
            let value = value.to_str().ok()?.to_owned();
            Some((
                HeaderName::from(name.as_str().to_owned()),
                HeaderValue::from(value),
            ))
        });
        let headers = Headers::from(headers.collect::<std::collections::HashMap<_, _>>());
        let body = read_body(&mut answer, MANAGEMENT_ANSWER_SIZE_MAX)
            .await
            .map_err(broken)?;
        Ok(AsyncRawResponse::from_bytes(status, headers, body))
    }
}
